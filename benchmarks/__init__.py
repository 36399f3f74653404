"""What `saccade bench` runs. It is no part of the library and of no distribution: it runs from a checkout."""
