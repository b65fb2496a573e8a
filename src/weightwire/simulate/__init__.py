"""A fan-out under a virtual clock: the scheduler and the selection that real loads use, without bytes or sockets."""
