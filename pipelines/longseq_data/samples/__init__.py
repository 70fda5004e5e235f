"""From records or a corpus to training rows, each a function of the seed and the sample's number."""
