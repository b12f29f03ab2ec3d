//! `ovenbird registry inspect`.

use std::fmt::Write as _;

use clap::Args;
use ovenbird::{Error, registry};
use serde_json::json;

use crate::args::Format;
use crate::commands::unless_cancelled;
use crate::progress::bytes;
use crate::render::one_line;
use crate::session::Session;

/// Show an image of a registry: platforms, sizes, configuration. Its layers are not fetched.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Name of the image
    image: String,
    /// text, or json: manifests and configurations
    #[arg(long, value_enum, default_value_t = Format::Text, conflicts_with = "raw")]
    format: Format,
    /// The bytes of the manifest or index, as they are
    #[arg(long)]
    raw: bool,
}

pub(super) fn run(args: &InspectArgs, session: &Session) -> Result<(), Error> {
    let image = session.settings.reference(&args.image)?;
    let builder = session.images_only()?;
    let (progress, job) = session.start(true, false);
    let inspected = registry::inspect(&builder, &image, &job);
    progress.finish();
    let inspected = unless_cancelled(inspected, &job)?;
    if args.raw {
        return crate::print(&String::from_utf8_lossy(&inspected.raw));
    }
    if args.format == Format::Json {
        let images = inspected.members.iter().map(|member| {
            json!({"platform": member.platform, "digest": member.manifest.digest, "manifest": member.document, "config": member.config})
        });
        return crate::print(&crate::commands::json(&json!({
            "name": image, "digest": inspected.target.digest, "mediaType": inspected.target.media_type, "size": inspected.size(),
            "images": images.collect::<Vec<_>>(),
        }))?);
    }
    let mut text = format!(
        "name:    {}\ndigest:  {}\ntype:    {}\nsize:    {}\n",
        image,
        inspected.target.digest,
        inspected.target.media_type,
        bytes(inspected.size())
    );
    for member in &inspected.members {
        let size = member.document.layers.iter().fold(member.document.config.size, |sum, layer| sum.saturating_add(layer.size));
        let run = &member.config.config;
        let _ = write!(
            text,
            "\nplatform {}\n  digest:     {}\n  size:       {} in {} layers\n",
            one_line(&member.platform.to_string()),
            member.manifest.digest,
            bytes(size),
            member.document.layers.len()
        );
        let mut row = |name: &str, value: String| {
            if !value.is_empty() {
                let _ = writeln!(text, "  {:<11} {}", format!("{name}:"), one_line(&value));
            }
        };
        row("created", member.config.created.clone().unwrap_or_default());
        row("user", run.user.clone());
        row("workdir", run.working_dir.clone());
        row("entrypoint", run.entrypoint.as_ref().map(|e| format!("{e:?}")).unwrap_or_default());
        row("command", run.cmd.as_ref().map(|c| format!("{c:?}")).unwrap_or_default());
        row("ports", run.exposed_ports.keys().cloned().collect::<Vec<_>>().join(", "));
        row("labels", run.labels.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(", "));
    }
    crate::print(&text)
}
