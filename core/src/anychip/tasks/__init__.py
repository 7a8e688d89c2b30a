"""Which task a checkpoint serves, and what its vectors mean, as its files say."""
