//! ovenbird-cli
