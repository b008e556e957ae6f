"""What costs how much, beside the peers. Every figure is a ratio of medians within one run; nothing here is a test."""
