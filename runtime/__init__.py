"""What runs inside a service: the container, its init, templates, workers, one file per runtime.

Standard library and msgpack only, Python 3.9 and later; nothing of the daemon but the wire format.
"""
