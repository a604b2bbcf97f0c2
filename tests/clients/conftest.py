"""The programs run in environments of their own and import what is there alone."""

collect_ignore = ["programs"]
