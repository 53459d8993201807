"""What turns sound into vectors: log-mel features, the AudioMAE++ network, pooling, and the encoder around them."""
