"""What each stage leaves behind, and how a reader knows that it is whole."""
