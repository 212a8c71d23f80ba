"""From a quantized checkpoint to a Marlin one and back, planned, checked and reported."""
