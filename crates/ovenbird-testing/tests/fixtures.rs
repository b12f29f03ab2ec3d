//! The fixtures themselves: what the other tests stand on.

use std::process::Command;

use ovenbird_testing::base::Base;
use ovenbird_testing::needs::{Need, available};
use ovenbird_testing::process::output;
use ovenbird_testing::registry::{Options, Registry};
use ovenbird_testing::relay::Relay;
use ovenbird_testing::{Result, archive};

fn skopeo(args: &[&str]) -> Result<String> {
    output(Command::new("skopeo").args(args))
}

#[test]
fn a_registry_holds_busybox_and_asks_for_credentials() -> Result<()> {
    if !available("fixtures::registry", &[Need::Registry]) {
        return Ok(());
    }
    let open = Registry::start()?;
    let image = format!("docker://{}/library/busybox:latest", open.address());
    let found = skopeo(&["inspect", "--tls-verify=false", &image])?;
    assert!(found.contains("\"Os\": \"linux\""), "{found}");
    let closed = Registry::start_with(Options { bases: &[Base::Busybox], credentials: Some(("anna", "pass word")) })?;
    let image = format!("docker://{}/library/busybox:latest", closed.address());
    assert!(skopeo(&["inspect", "--tls-verify=false", &image]).is_err());
    skopeo(&["inspect", "--tls-verify=false", "--creds=anna:pass word", &image])?;
    assert_ne!(open.port(), closed.port());
    Ok(())
}

#[test]
fn the_reader_flattens_what_skopeo_writes() -> Result<()> {
    if !available("fixtures::reader", &[Need::Registry]) {
        return Ok(());
    }
    let dir = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
    let file = dir.path().join("busybox.tar");
    skopeo(&["copy", "--quiet", &format!("oci:{}", Base::Busybox.layout()?.display()), &format!("oci-archive:{}", file.display())])?;
    let images = archive::images(&file)?;
    let tree = archive::flatten(&images[0].layers)?;
    assert_eq!(tree["/tmp"].mode, 0o1777);
    assert_eq!(tree["/bin/sh"].kind, archive::Kind::Link("/bin/busybox".into()));
    assert_eq!(Base::Busybox.diff_ids()?.len(), images[0].layers.len());
    Ok(())
}

#[test]
fn a_relay_hangs_up() -> Result<()> {
    if !available("fixtures::relay", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let relay = Relay::start(registry.port(), 100_000, u64::MAX)?;
    let dir = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
    let image = format!("docker://{}/library/busybox:latest", relay.address());
    let copied = skopeo(&["copy", "--quiet", "--src-tls-verify=false", &image, &format!("dir:{}", dir.path().display())]);
    assert!(copied.is_err() && relay.hang_ups() > 0, "{copied:?}");
    Ok(())
}

#[test]
fn debian_is_made_once() -> Result<()> {
    if !available("fixtures::debian", &[Need::Debian]) {
        return Ok(());
    }
    assert_eq!(Base::Debian.layout()?, Base::Debian.layout()?);
    assert_eq!(Base::Debian.diff_ids()?.len(), 1);
    Ok(())
}
