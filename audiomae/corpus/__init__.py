"""What goes into the product: listing a corpus, decoding its files, and a corpus to try everything on."""
