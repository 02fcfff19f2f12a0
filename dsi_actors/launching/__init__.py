"""Where and how worker processes are started: the interface of a launcher, and the launchers that there are."""
