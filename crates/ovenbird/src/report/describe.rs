//! Images and sources as a report shows them.

use serde_json::{Value, json};

use super::{BaseReport, GitReport, ImageReport};
use crate::request::Source;
use crate::source::{SourceTree, git};
use crate::workflow::{Base, Delivered, Described};

/// What git says of the source, if it is of a repository.
pub(crate) fn git_of(source: &Source, tree: Option<&SourceTree>) -> Option<GitReport> {
    if let Some(revision) = tree.and_then(|tree| tree.revision.as_ref()) {
        return Some(GitReport { commit: revision.commit.clone(), branch: revision.branch.clone(), tag: revision.tag.clone() });
    }
    if let Some(git) = tree.and_then(|tree| tree.git.clone()) {
        return Some(git);
    }
    // The worker of a caller has another folder, of no repository.
    if tree.is_some_and(|tree| tree.is_sent) {
        return None;
    }
    let Source::Path(dir) = source else { return None };
    let head = git::head(dir).ok()?;
    Some(GitReport { commit: head.sha, branch: head.branch, tag: head.tag })
}

/// A built image.
pub(crate) fn image_of(image: &Described, delivered: &Delivered) -> ImageReport {
    let digests: Vec<String> =
        delivered.pushed.iter().map(|name| format!("{}@{}", repository(&name.familiar()), image.manifest.digest)).collect();
    shown(image, &delivered.names, &digests)
}

/// A base image.
pub(crate) fn base_of(base: &Base) -> BaseReport {
    let name = base.reference.to_string();
    BaseReport { is_final: base.is_final, image: shown(&base.image, &[], std::slice::from_ref(&name)), name }
}

fn repository(name: &str) -> &str {
    let name = name.split('@').next().unwrap_or(name);
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => name,
    }
}

fn shown(image: &Described, names: &[String], digests: &[String]) -> ImageReport {
    let config = &image.config;
    let of = |key: &str| config.get(key).cloned().unwrap_or_default();
    let created = of("created");
    let labels = config.pointer("/config/Labels").cloned().unwrap_or_default();
    ImageReport {
        platform: image.platform.to_string(),
        digest: image.manifest.digest.to_string(),
        size: image.size,
        inspect: json!({
            "Id": image.id, "RepoTags": names, "RepoDigests": digests, "Created": created, "Author": of("author"),
            "Architecture": of("architecture"), "Variant": of("variant"), "Os": of("os"), "Size": image.size, "Config": of("config"),
            "RootFS": { "Type": "layers", "Layers": config.pointer("/rootfs/diff_ids").cloned().unwrap_or_default() },
            "History": of("history"), "Manifest": image.document,
        }),
        info: json!({
            "Id": image.id, "ParentId": "", "RepoTags": names, "RepoDigests": digests, "Created": seconds(&created),
            "Size": image.size, "VirtualSize": image.size, "Labels": labels, "Containers": -1,
        }),
    }
}

fn seconds(created: &Value) -> i64 {
    created.as_str().and_then(|text| text.parse::<jiff::Timestamp>().ok()).map_or(0, jiff::Timestamp::as_second)
}
