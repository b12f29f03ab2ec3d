//! `COPY`, `ADD`, `WORKDIR` without running anything: writes a new diff folder above a base.
