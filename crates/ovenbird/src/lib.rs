//! ovenbird
