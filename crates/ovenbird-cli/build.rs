//! Lays the program out for few pages: see `layout.ld`.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=layout.ld");
    let is = |name: &str, value: &str| env::var(name).is_ok_and(|is| is == value);
    // mold takes no such script, and needs none to work.
    let mold = ["CARGO_ENCODED_RUSTFLAGS", "RUSTC_LINKER"].iter().any(|name| env::var(name).is_ok_and(|value| value.contains("mold")));
    if is("PROFILE", "release") && is("CARGO_CFG_TARGET_OS", "linux") && !mold {
        println!("cargo:rustc-link-arg-bins=-Wl,-T,{}/layout.ld", env::var("CARGO_MANIFEST_DIR").unwrap_or_default());
    }
}
