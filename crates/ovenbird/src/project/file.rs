//! The text of `ovenbird.toml`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_oci::regular_file::{self, Links};
use serde::Deserialize;

use super::{Context, IMAGE, Image, Project};
use crate::error::{Error, Kind};
use crate::request::tag::Template;
use crate::request::{ContextSource, Source, Workflow};

/// Name of the file.
pub const NAME: &str = "ovenbird.toml";
/// Version of the format that is read.
pub const VERSION: u32 = 1;
/// Largest file, in bytes.
const MAX: u64 = 1 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: Option<u32>,
    #[serde(default)]
    defaults: Entry,
    #[serde(default)]
    image: BTreeMap<String, Entry>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Entry {
    path: Option<String>,
    file: Option<PathBuf>,
    target: Option<String>,
    args: BTreeMap<String, String>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    tags: Option<Vec<String>>,
    platforms: Option<Vec<String>>,
    contexts: BTreeMap<String, String>,
    depends_on: Option<Vec<String>>,
    files: Option<Vec<String>>,
    plugins: Workflow,
}

impl Entry {
    /// Over these defaults: tables are joined, everything else is replaced.
    fn over(self, defaults: &Self) -> Self {
        let join = |own: BTreeMap<String, String>, defaults: &BTreeMap<String, String>| {
            let mut all = defaults.clone();
            all.extend(own);
            all
        };
        Self {
            path: self.path.or_else(|| defaults.path.clone()),
            file: self.file.or_else(|| defaults.file.clone()),
            target: self.target.or_else(|| defaults.target.clone()),
            args: join(self.args, &defaults.args),
            labels: join(self.labels, &defaults.labels),
            annotations: join(self.annotations, &defaults.annotations),
            tags: self.tags,
            platforms: self.platforms.or_else(|| defaults.platforms.clone()),
            contexts: join(self.contexts, &defaults.contexts),
            depends_on: self.depends_on,
            files: self.files.or_else(|| defaults.files.clone()),
            plugins: {
                let mut all = defaults.plugins.clone();
                all.extend(self.plugins);
                all
            },
        }
    }
}

/// Reads the project of a folder, if it is one.
pub(super) fn read(folder: &Path) -> Result<Option<Project>, Error> {
    let path = folder.join(NAME);
    // Not through a link, as other files that come with a source.
    let text = match regular_file::read_to_string(&path, MAX, Links::Refuse) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(Error::from_chain(Kind::Configuration, &error)
                .while_doing(format!("cannot read {}", path.display()))
                .hint(format!("it must be a regular file of at most {MAX} bytes, no link")));
        }
    };
    parse(folder, &text).map(Some).map_err(|error| error.while_doing(format!("{} cannot be used", path.display())))
}

fn parse(folder: &Path, text: &str) -> Result<Project, Error> {
    let wrong = |what: String| Error::new(Kind::Configuration, what);
    let file: File = toml::from_str(text).map_err(|error| wrong(error.to_string().trim_end().to_owned()))?;
    if file.version.unwrap_or(VERSION) != VERSION {
        return Err(wrong(format!("version {} is not supported: this program reads version {VERSION}", file.version.unwrap_or_default())));
    }
    let once = [("tags", file.defaults.tags.is_some()), ("depends_on", file.defaults.depends_on.is_some())];
    if let Some((key, _)) = once.iter().find(|(_, said)| *said) {
        return Err(wrong(format!("{key} in [defaults] would be the same for all images: say it in each image")));
    }
    if file.image.is_empty() {
        return Err(wrong("it has no images".into()).hint("add one: [image.NAME]"));
    }
    let mut images = BTreeMap::new();
    for (name, entry) in file.image {
        let valid = !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b));
        if !valid || name.starts_with(['.', '-', '_']) {
            return Err(wrong(format!("{name:?} is no name of an image"))
                .hint("names have small letters, digits, dots, dashes and underscores, and begin with a letter or digit"));
        }
        let image = image(folder, &name, entry.over(&file.defaults))?;
        images.insert(name, image);
    }
    let project = Project { folder: folder.to_owned(), images };
    for (name, image) in &project.images {
        if let Some(missing) = image.needs().find(|need| !project.images.contains_key(*need)) {
            return Err(wrong(format!("image {name} needs {missing}, which is no image of the project")));
        }
    }
    let tags = || project.images.iter().flat_map(|(name, image)| image.tags.iter().map(move |tag| (tag, name)));
    if let Some(((tag, one), (_, two))) = tags().find_map(|one| Some((one, tags().find(|two| two.0 == one.0 && two.1 != one.1)?))) {
        return Err(wrong(format!("images {one} and {two} have the same tag {tag:?}: the last that is built would have it")));
    }
    circles(&project)?;
    Ok(project)
}

/// Takes away what needs nothing that is left, until nothing is: what stays goes round.
fn circles(project: &Project) -> Result<(), Error> {
    let mut left: BTreeSet<&str> = project.names().collect();
    loop {
        let free: Vec<&str> = left.iter().copied().filter(|name| project.needs(name).is_disjoint(&left)).collect();
        if free.is_empty() {
            break;
        }
        left.retain(|name| !free.contains(name));
    }
    if left.is_empty() {
        return Ok(());
    }
    Err(Error::new(Kind::Configuration, format!("images need each other: {}", left.into_iter().collect::<Vec<_>>().join(", "))))
}

fn image(folder: &Path, name: &str, mut entry: Entry) -> Result<Image, Error> {
    let wrong = |what: &str, why: String| Error::new(Kind::Configuration, format!("{what} of image {name}: {why}"));
    match entry.path.as_deref().map(str::parse::<Source>) {
        Some(Err(error)) => return Err(wrong("path", error.to_string())),
        Some(Ok(Source::Stdin)) => return Err(wrong("path", "standard input is no part of a project".into())),
        _ => {}
    }
    for tag in &entry.tags.iter().flatten().collect::<Vec<_>>() {
        Template::parse(tag).map_err(|error| wrong("tags", error.to_string()))?;
    }
    let platforms = entry.platforms.unwrap_or_default();
    let platforms = platforms.iter().map(|text| text.parse()).collect::<Result<_, _>>();
    let mut contexts = BTreeMap::new();
    for (context, text) in entry.contexts {
        if context == "context" {
            return Err(wrong("context context", "that is the main one: say it with path".into()));
        }
        let value = match text.strip_prefix(IMAGE) {
            Some(other) => Context::Image(other.to_owned()),
            None => Context::Other(text.parse::<ContextSource>().map_err(|error| wrong(&format!("context {context}"), error.to_string()))?),
        };
        contexts.insert(context, value);
    }
    // `--changed` sees no other file, so the pattern would match nothing for ever.
    let leads_out = |pattern: &&String| ovenbird_dockerfile::ignore::clean(pattern.trim_start_matches('!')).split('/').next() == Some("..");
    if let Some(pattern) = entry.files.iter().flatten().find(leads_out) {
        return Err(wrong("files", format!("{pattern:?} leads out of the folder of the project")));
    }
    // Programs are seen from the file.
    entry.plugins.rebase(folder);
    Ok(Image {
        path: entry.path,
        file: entry.file,
        target: entry.target,
        args: entry.args,
        labels: entry.labels,
        annotations: entry.annotations,
        tags: entry.tags.unwrap_or_default(),
        platforms: platforms.map_err(|error: ovenbird_oci::platform::ParsePlatformError| wrong("platforms", error.to_string()))?,
        contexts,
        depends_on: entry.depends_on.unwrap_or_default(),
        workflow: entry.plugins,
        files: entry.files.map(|patterns| Patterns::new(&patterns)).transpose().map_err(|error| wrong("files", error.to_string()))?,
    })
}
