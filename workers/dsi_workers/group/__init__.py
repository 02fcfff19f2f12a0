"""A worker that is a group: several processes with a device each, among which the weights of one model are divided."""
