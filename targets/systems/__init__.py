"""Systems as data: devices, their host and storage, and the links between devices."""
