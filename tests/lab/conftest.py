"""Keep the guest's tests out of a test run on the outer machine."""

collect_ignore = ["guest"]
