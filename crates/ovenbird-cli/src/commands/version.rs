//! `ovenbird version`.

use clap::Args;
use ovenbird::Error;
use ovenbird_oci::Platform;
use serde_json::json;

/// Print the version.
#[derive(Debug, Args)]
pub(crate) struct VersionArgs {
    /// JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &VersionArgs) -> Result<(), Error> {
    let (version, platform) = (env!("CARGO_PKG_VERSION"), Platform::host());
    if args.json {
        return crate::print(&super::json(&json!({"version": version, "platform": platform.to_string()}))?);
    }
    crate::print(&format!("ovenbird {version} {platform}\n"))
}
