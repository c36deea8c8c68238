"""The kernel from Python: system calls, namespaces, mounts, privilege, messages with descriptors, live fork.

Standard library only, Python 3.9 and later: this package is loaded into services.
"""
