//! OCI layouts and docker archives.
