"""Launchers: several training runs put to work, on this machine or on a cluster, each with a fate of its own."""
