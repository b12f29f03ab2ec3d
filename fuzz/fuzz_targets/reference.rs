//! Image names: no panic, and the normal form is a fixed point.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovenbird_oci::{Platform, Reference};

fuzz_target!(|text: &str| {
    if let Ok(reference) = text.parse::<Reference>() {
        let full = reference.to_string();
        assert_eq!(full.parse::<Reference>().as_ref(), Ok(&reference), "{full}");
        let familiar = reference.familiar();
        assert_eq!(familiar.parse::<Reference>().as_ref(), Ok(&reference), "{familiar}");
    }
    if let Ok(platform) = text.parse::<Platform>() {
        assert_eq!(platform.normalized(), platform);
        assert_eq!(platform.to_string().parse::<Platform>(), Ok(platform));
    }
});
