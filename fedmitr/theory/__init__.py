"""What the paper's theory claims, as things to measure: gradient variance, stability, generalisation gap."""
