"""One file a stage; none imports another."""
