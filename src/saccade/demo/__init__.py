"""The demo: a small sparse multi-camera detector, trained from scratch with every operator of the package at work."""


class DemoError(Exception):
    """The demo cannot do what was asked; the message is one line for its user."""


class SampleError(DemoError):
    """A sample cannot be made, of which processes that train on other samples know nothing."""
