"""Workers on several hosts: an agent on each host starts them, and the engine's process tells the agents what to start.
Steps do not come this way: workers connect to the same sockets as those of one host."""
