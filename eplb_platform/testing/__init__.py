"""Tools for tests of anything that is built on the platform: processes, faults, the backend contract."""
