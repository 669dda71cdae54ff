"""From text to states to vocabulary: residual streams, the logit lens, probes and their directions."""
