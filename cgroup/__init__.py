"""cgroup v2: where it is, its files as typed attributes on cgroupspy's nodes, limits as people write them."""
