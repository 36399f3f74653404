"""The demo: a small sparse multi-camera detector, trained from scratch with every operator of Saccade at work.

`run` is one run of `saccade demo`, `model` the detector, `geometry` a set of camera images and what is where in them,
`evaluation` how well boxes are found. Of the folders, `data` uses `rendering`, and `training` uses `data`; `pictures`
draws what there is. Of the library, the public names are used, as in anybody's own project.
"""


class DemoError(Exception):
    """The demo cannot do what was asked; the message is one line for its user."""


class SampleError(DemoError):
    """A sample cannot be made, of which processes that train on other samples know nothing."""
