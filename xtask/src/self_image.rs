//! `cargo xtask self-image`: the main job on ourselves. Builds `ovenbird` statically, then an image of it from scratch, with itself.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Leaves `target/self-image/ovenbird.oci.tar` and prints its digest. Needs neither a registry, nor Docker, nor root.
pub(crate) fn build(repository: &Path) -> Result<(), String> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let flags = format!("{} -C target-feature=+crt-static", std::env::var("RUSTFLAGS").unwrap_or_default());
    // With a target named, the flags are for the program alone: procedural macros cannot be static.
    crate::run(
        Command::new(env!("CARGO"))
            .current_dir(repository)
            .args(["build", "--release", "--locked", "--package", "ovenbird-cli", "--target", &target])
            .env("RUSTFLAGS", flags.trim()),
    )?;
    let folder = repository.join("target/self-image");
    let context = folder.join("context");
    let failed = |error: std::io::Error| format!("cannot prepare {}: {error}", context.display());
    fs::create_dir_all(&context).map_err(failed)?;
    let target_dir = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository.join("target"), |dir| repository.join(dir));
    let program = target_dir.join(&target).join("release/ovenbird");
    let copy = context.join("ovenbird");
    fs::copy(&program, &copy).map_err(failed)?;
    let archive = folder.join("ovenbird.oci.tar");
    crate::run(
        Command::new(&copy)
            .arg("build")
            .arg("--root")
            .arg(folder.join("state"))
            .arg("--file")
            .arg(repository.join("examples/self-image/Dockerfile"))
            .args(["--reproducible", "--build-arg", concat!("VERSION=", env!("CARGO_PKG_VERSION"))])
            .args(["--tag", concat!("ovenbird:", env!("CARGO_PKG_VERSION"))])
            .arg("--output")
            .arg(format!("type=oci,dest={}", archive.display()))
            .arg(&context),
    )?;
    let size = fs::metadata(&archive).map_err(failed)?.len();
    println!("{} ({} MB)", archive.display(), size / 1_000_000);
    Ok(())
}
