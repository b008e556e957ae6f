"""What costs how much, as ratios of medians within one run, beside the peers. No tests are here."""
