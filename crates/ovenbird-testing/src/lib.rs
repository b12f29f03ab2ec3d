//! ovenbird-testing
