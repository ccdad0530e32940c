"""Launchers: start several training runs, on this machine or on a cluster; each ends independently."""
