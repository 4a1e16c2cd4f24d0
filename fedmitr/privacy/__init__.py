"""What uploads, sums of features, synthetic images and models give away: membership and reconstruction."""
