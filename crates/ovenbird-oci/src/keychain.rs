//! Docker config and credential helpers.
