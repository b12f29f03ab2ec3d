//! `ovenbird.toml`: the images of a repository, and what each is built from.
//!
//! The file came with the source, so without the user's trust it may say only what harms nobody: what is below its own folder, and names
//! that lead to no registry of its choice. See docs/decisions/0006-project-settings.md. It must not know how images are built.

mod file;
mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_oci::regular_file::{self, Links};
use ovenbird_oci::{Digest, Platform};

pub use file::{NAME, VERSION};
pub use run::{Built, Runner};

use crate::error::{Error, Kind};
use crate::request::{BuildRequest, ContextSource, DockerfileFrom, OutputKind, Source, Workflow};

/// What stands before the name of another image in `contexts`.
const IMAGE: &str = "image:";
/// Largest ignore file that is looked at, in bytes.
const MAX_IGNORE: u64 = 16 << 20;

/// The images of a repository.
#[derive(Debug, Clone)]
pub struct Project {
    /// Its folder.
    folder: PathBuf,
    images: BTreeMap<String, Image>,
}

/// What a context is without.
const IGNORE: &str = ".dockerignore";

/// Where names without a registry lead when they are pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registries {
    /// To the registry that the user's settings name.
    OfTheUser,
    /// To Docker Hub: whoever writes a name says where it goes.
    DockerHub,
}

/// One image.
#[derive(Debug, Clone, PartialEq, Default)]
struct Image {
    path: Option<String>,
    file: Option<PathBuf>,
    target: Option<String>,
    args: BTreeMap<String, String>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    tags: Vec<String>,
    platforms: Vec<Platform>,
    contexts: BTreeMap<String, Context>,
    depends_on: Vec<String>,
    files: Option<Patterns>,
    workflow: Workflow,
}

/// One more context of an image.
#[derive(Debug, Clone, PartialEq)]
enum Context {
    /// What another image of the project came to.
    Image(String),
    /// As in `--build-context`.
    Other(ContextSource),
}

impl Image {
    fn bases(&self) -> impl Iterator<Item = &str> {
        self.contexts.values().filter_map(|context| if let Context::Image(name) = context { Some(name.as_str()) } else { None })
    }

    fn needs(&self) -> impl Iterator<Item = &str> {
        self.depends_on.iter().map(String::as_str).chain(self.bases())
    }

    fn source(&self) -> Source {
        self.path.as_deref().unwrap_or(".").parse().unwrap_or_else(|_| Source::Path(".".into()))
    }
}

impl Project {
    /// The project of a folder, if it is one: the folders above are not looked at.
    pub fn find(folder: &Path) -> Result<Option<Self>, Error> {
        file::read(folder)
    }

    /// Is there a file that makes a folder a project?
    pub fn is_at(folder: &Path) -> bool {
        folder.join(NAME).symlink_metadata().is_ok()
    }

    /// Names of all images.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.images.keys().map(String::as_str)
    }

    /// Has it an image of this name?
    pub fn has(&self, name: &str) -> bool {
        self.images.contains_key(name)
    }

    /// Is an image built from the folder that has its name?
    pub fn is_of_folder(&self, name: &str) -> bool {
        self.images.get(name).is_some_and(|image| matches!(image.source(), Source::Path(path) if cleaned(&path).as_deref() == Some(name)))
    }

    fn image(&self, name: &str) -> Result<&Image, Error> {
        self.images.get(name).ok_or_else(|| {
            let error = Error::new(Kind::Usage, format!("{NAME} has no image {name:?}"));
            match ovenbird_dockerfile::suggest::nearest(name, self.names()) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error.hint(format!("it has: {}", self.names().collect::<Vec<_>>().join(", "))),
            }
        })
    }

    /// These images and those that they need, each after what it needs.
    pub fn order<'a>(&'a self, asked: impl IntoIterator<Item = &'a str>) -> Result<Vec<&'a str>, Error> {
        let mut order: Vec<&str> = vec![];
        for name in asked {
            self.image(name)?;
            // No recursion: the file may be long. `true`: what it needs is in the order already.
            let mut open = vec![(name, false)];
            while let Some((name, ready)) = open.pop() {
                if order.contains(&name) {
                    continue;
                }
                if ready {
                    order.push(name);
                    continue;
                }
                open.push((name, true));
                open.extend(self.image(name)?.needs().filter(|need| !order.contains(need)).map(|need| (need, false)));
            }
        }
        Ok(order)
    }

    /// What an image needs to be built before it.
    pub fn needs(&self, name: &str) -> BTreeSet<&str> {
        self.images.get(name).into_iter().flat_map(Image::needs).collect()
    }

    /// Images whose results an image reads.
    fn bases(&self, name: &str) -> impl Iterator<Item = &str> {
        self.images.get(name).into_iter().flat_map(Image::bases)
    }

    /// Images that depend on any of these files (seen from the project's folder), and those that need them.
    pub fn touched(&self, files: &[PathBuf]) -> Result<BTreeSet<&str>, Error> {
        let files: Vec<String> = files.iter().map(|file| self.relative(file)).collect::<Result<_, _>>()?;
        let mut touched: BTreeSet<&str> = BTreeSet::new();
        for (name, image) in &self.images {
            if files.iter().any(|file| file == NAME || self.depends(image, file)) {
                touched.insert(name);
            }
        }
        loop {
            let more: Vec<&str> = self
                .images
                .iter()
                .filter(|(name, image)| !touched.contains(name.as_str()) && image.needs().any(|need| touched.contains(need)))
                .map(|(name, _)| name.as_str())
                .collect();
            if more.is_empty() {
                return Ok(touched);
            }
            touched.extend(more);
        }
    }

    /// A path as seen from the folder, cleaned.
    fn relative(&self, file: &Path) -> Result<String, Error> {
        let below = file.strip_prefix(&self.folder).unwrap_or(file);
        match cleaned(below) {
            Some(path) => Ok(path),
            None => Err(Error::new(Kind::Usage, format!("--changed {}: it is not below {}", file.display(), self.folder.display()))),
        }
    }

    fn depends(&self, image: &Image, file: &str) -> bool {
        let context = match image.source() {
            Source::Path(path) => cleaned(&path),
            _ => None,
        };
        // What may stand before a name in it.
        let below = |folder: &str, file: &str| match folder {
            "" => Some(file.to_owned()),
            folder => file.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/')).map(str::to_owned),
        };
        let join = |folder: &str, name: &str| if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") };
        let dockerfile = match (&image.file, &context) {
            (Some(file), _) => cleaned(file),
            (None, Some(context)) => Some(join(context, "Dockerfile")),
            (None, None) => None,
        };
        let recipe = dockerfile.is_some_and(|name| file == name || file == format!("{name}.dockerignore"));
        let ignore_file = context.as_deref().is_some_and(|context| file == join(context, ".dockerignore"));
        let inputs = match (&image.files, &context) {
            (Some(patterns), _) => patterns.is_ignored(file),
            (None, Some(context)) => below(context, file).is_some_and(|inside| {
                let path = self.folder.join(context).join(".dockerignore");
                let text = regular_file::read_to_string(&path, MAX_IGNORE, Links::Refuse).unwrap_or_default();
                !Patterns::parse(&text).is_ok_and(|patterns| patterns.is_ignored(&inside))
            }),
            (None, None) => false,
        };
        let named = image.contexts.values().any(|context| match context {
            Context::Other(ContextSource::Path(path)) => cleaned(path).is_some_and(|folder| below(&folder, file).is_some()),
            _ => false,
        });
        recipe || ignore_file || inputs || named
    }

    /// Refuses, by name, what only a project that the user trusts may say. `pushes`: the images go to the registries of their names.
    pub fn check_trust(&self, trusted: &[PathBuf], pushes: Option<Registries>) -> Result<(), Error> {
        let real = |dir: &Path| std::fs::canonicalize(dir).ok();
        let folder = real(&self.folder).unwrap_or_else(|| self.folder.clone());
        if trusted.iter().filter_map(|dir| real(dir)).any(|dir| folder.starts_with(dir)) {
            return Ok(());
        }
        let mut refused = vec![];
        for (name, image) in &self.images {
            // What does not exist yet is an error of its own, later.
            let inside = |path: &Path| {
                let lexical = cleaned(path).is_some() && path.is_relative();
                lexical && real(&self.folder.join(path)).is_none_or(|path| path.starts_with(&folder))
            };
            match image.source() {
                Source::Path(path) if inside(&path) => {
                    if image.file.as_deref().is_some_and(|file| !inside(file)) {
                        refused.push(format!("file of {name}"));
                    } else if let Some(link) = read_by_itself(&path, image.file.as_deref()).find(|file| !inside(file)) {
                        refused.push(format!("{} of {name}, a link", link.display()));
                    }
                }
                source => refused.push(format!("path of {name} ({})", shown(&source))),
            }
            for (context, value) in &image.contexts {
                let harmless = match value {
                    Context::Image(_) | Context::Other(ContextSource::Target(_)) => true,
                    Context::Other(ContextSource::Image(image)) => image.starts_with("docker-image://"),
                    Context::Other(ContextSource::Path(path)) => inside(path) && inside(&path.join(IGNORE)),
                    Context::Other(ContextSource::Remote(_)) => false,
                };
                if !harmless {
                    refused.push(format!("context {context} of {name}"));
                }
            }
            refused.extend(crate::workflow::reaching_out(&image.workflow).map(|plugin| format!("plugin {plugin} of {name}")));
            let leads = |tag: &&String| pushes == Some(Registries::OfTheUser) && has_registry(tag) || pushes == Some(Registries::DockerHub);
            if let Some(tag) = image.tags.iter().find(leads) {
                refused.push(format!("where {name} is pushed to ({tag})"));
            }
        }
        if refused.is_empty() {
            return Ok(());
        }
        Err(Error::new(
            Kind::Configuration,
            format!("{} says what only a project that you trust may say: {}", self.file().display(), refused.join(", ")),
        )
        .because("it came with the source, and could take what is outside of it, or lead images elsewhere")
        .hint(format!("if you trust whoever writes there, add trusted_projects = [{:?}] to your settings", folder.display().to_string())))
    }

    /// Where it was read.
    pub fn file(&self) -> PathBuf {
        self.folder.join(NAME)
    }

    /// Has an image names?
    pub fn has_tags(&self, name: &str) -> bool {
        self.images.get(name).is_some_and(|image| !image.tags.is_empty())
    }

    /// The request for an image: what the project says, and over it what `base` (the command line) says. `built`: what the images that it needs
    /// came to.
    fn request(
        &self,
        name: &str,
        base: &BuildRequest,
        built: &dyn Fn(&str) -> Option<(Option<String>, Digest)>,
    ) -> Result<BuildRequest, Error> {
        let image = self.image(name)?;
        let mut request = base.clone();
        let at = |path: &Path| self.folder.join(path);
        request.source = match image.source() {
            Source::Path(path) => Source::Path(at(&path)),
            other => other,
        };
        let remote = !matches!(request.source, Source::Path(_));
        if base.dockerfile == DockerfileFrom::Default
            && let Some(file) = &image.file
        {
            request.dockerfile = DockerfileFrom::Path(if remote { file.clone() } else { at(file) });
        }
        request.target = base.target.clone().or_else(|| image.target.clone());
        // What was typed is stronger.
        let over = |mut weak: BTreeMap<String, String>, strong: &BTreeMap<String, String>| {
            weak.extend(strong.clone());
            weak
        };
        request.build_args = over(image.args.clone(), &base.build_args);
        request.labels = over(image.labels.clone(), &base.labels);
        request.annotations = over(image.annotations.clone(), &base.annotations);
        if base.platforms.is_empty() {
            request.platforms.clone_from(&image.platforms);
        }
        // Those of the file first, as a workflow file is before the flags.
        request.workflow = image.workflow.clone();
        request.workflow.extend(base.workflow.clone());
        if base.names.is_empty() {
            request.names.clone_from(&image.tags);
        }
        for (context, value) in &image.contexts {
            if base.contexts.contains_key(context) {
                continue;
            }
            let value = match value {
                Context::Other(ContextSource::Path(path)) => ContextSource::Path(at(path)),
                Context::Other(other) => other.clone(),
                Context::Image(other) => {
                    let (place, digest) = built(other)
                        .ok_or_else(|| Error::new(Kind::Bug, format!("image {name} is built before {other}, which it needs")))?;
                    // By digest, so that it is this result and no other. The store has it; the name says where its layers are beside.
                    let place = place.unwrap_or_else(|| format!("localhost/ovenbird/{other}"));
                    let at = place.rfind(':').filter(|at| !place[*at..].contains('/')).unwrap_or(place.len());
                    ContextSource::Image(format!("docker-image://{}@{digest}", &place[..at]))
                }
            };
            request.contexts.insert(context.clone(), value);
        }
        Ok(request)
    }
}

/// What has no name is not pushed.
fn without_push(mut request: BuildRequest) -> BuildRequest {
    request.outputs.retain(|output| output.kind != OutputKind::Registry || !output.names.is_empty());
    request
}

fn shown(source: &Source) -> String {
    match source {
        Source::Path(path) => path.display().to_string(),
        Source::Stdin => "-".into(),
        Source::Remote(url) => url.to_string(),
    }
}

/// Files that a build reads without being told their names.
fn read_by_itself(context: &Path, file: Option<&Path>) -> impl Iterator<Item = PathBuf> + use<> {
    let dockerfiles = match file {
        Some(file) => vec![file.to_owned()],
        None => ["Dockerfile", "dockerfile"].map(|name| context.join(name)).to_vec(),
    };
    let beside = |file: &PathBuf| PathBuf::from(format!("{}{IGNORE}", file.display()));
    let beside: Vec<PathBuf> = dockerfiles.iter().map(beside).collect();
    dockerfiles.into_iter().chain(beside).chain([context.join(IGNORE)])
}

/// Does a name begin with a registry?
fn has_registry(tag: &str) -> bool {
    let plain = tag.split('{').next().unwrap_or_default();
    plain
        .split_once('/')
        .is_some_and(|(first, _)| first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|b| b.is_ascii_uppercase()))
}

/// A relative path without `.` and `..`; `None`: it leads elsewhere.
fn cleaned(path: &Path) -> Option<String> {
    let mut parts: Vec<&str> = vec![];
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::Normal(name) => parts.push(name.to_str()?),
            Component::ParentDir => drop(parts.pop()?),
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn project(text: &str) -> Result<(tempfile::TempDir, Project), String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(NAME), text).unwrap();
        let found = Project::find(dir.path()).map_err(|e| [vec![e.message], e.causes, e.hints].concat().join(" / "))?.unwrap();
        Ok((dir, found))
    }

    const THREE: &str = "[defaults]\nlabels = { team = 'x', who = 'all' }\nplatforms = ['linux/amd64']\n\
        plugins = { exit = [{ name = 'n', file = 'notify' }] }\n\
        [image.base]\npath = 'base'\n\
        [image.api]\npath = 'services/api'\nfile = 'docker/api.Dockerfile'\ntags = ['example.com/api:1']\ncontexts = { base = 'image:base', lib = 'lib' }\n\
        labels = { who = 'api' }\n\
        [image.docs]\ndepends_on = ['api']\nfiles = ['docs/**', '!docs/*.tmp']\n";

    #[test]
    fn order_and_what_is_touched() {
        let (_dir, project) = project(THREE).unwrap();
        assert_eq!(project.order(["api"]).unwrap(), ["base", "api"]);
        assert_eq!(project.order(project.names()).unwrap(), ["base", "api", "docs"]);
        let error = project.order(["apo"]).unwrap_err();
        assert_eq!((error.kind, error.hints), (Kind::Usage, vec!["did you mean `api`?".to_owned()]));
        for (file, expect) in [
            ("README.md", ""),
            ("base/x", "api base docs"),
            ("./services/api/main.c", "api docs"),
            ("docker/api.Dockerfile", "api docs"),
            ("docker/api.Dockerfile.dockerignore", "api docs"),
            ("lib/a", "api docs"),
            ("library/a", ""),
            ("docs/a/b", "docs"),
            ("docs/x.tmp", ""),
            ("Dockerfile", "docs"),
            ("ovenbird.toml", "api base docs"),
        ] {
            let touched: Vec<&str> = project.touched(&[file.into()]).unwrap().into_iter().collect();
            assert_eq!(touched.join(" "), expect, "{file}");
        }
        assert!(project.touched(&["../x".into()]).is_err());
    }

    #[test]
    fn what_is_ignored_touches_nothing() {
        let (dir, project) = project("[image.a]\n").unwrap();
        std::fs::write(dir.path().join(".dockerignore"), "*.log\n").unwrap();
        assert!(project.touched(&["x.log".into()]).unwrap().is_empty());
        assert_eq!(project.touched(&[dir.path().join("x.txt")]).unwrap().len(), 1);
    }

    #[test]
    fn requests() {
        let (dir, project) = project(THREE).unwrap();
        let mut base = BuildRequest::new(Source::Path(".".into()));
        base.labels.insert("team".into(), "typed".into());
        let digest = Digest::of(b"x");
        let request = project.request("api", &base, &|_| Some((Some("r.io:5000/base:1".into()), digest))).unwrap();
        assert_eq!(request.source, Source::Path(dir.path().join("services/api")));
        assert_eq!(request.dockerfile, DockerfileFrom::Path(dir.path().join("docker/api.Dockerfile")));
        assert_eq!(request.labels, BTreeMap::from([("team".into(), "typed".into()), ("who".into(), "api".into())]));
        assert_eq!(request.platforms.len(), 1);
        assert_eq!(request.names, ["example.com/api:1"]);
        assert_eq!(request.workflow.exit[0].file, Some(dir.path().join("notify")));
        assert_eq!(request.contexts["base"], ContextSource::Image(format!("docker-image://r.io:5000/base@{digest}")));
        let request = project.request("api", &base, &|_| Some((None, digest))).unwrap();
        assert_eq!(request.contexts["base"], ContextSource::Image(format!("docker-image://localhost/ovenbird/base@{digest}")));
        assert_eq!(request.contexts["lib"], ContextSource::Path(dir.path().join("lib")));
    }

    #[test]
    fn what_cannot_be_read() {
        for (text, expect) in [
            ("", "has no images"),
            ("version = 2\n[image.a]\n", "version 2 is not supported"),
            ("[image.a]\nfiel = 'x'\n", "unknown field `fiel`"),
            ("[image.a]\ndepends_on = ['b']\n", "image a needs b, which is no image of the project"),
            ("[image.a]\ncontexts = { x = 'image:' }\n", "image a needs , which is no image"),
            ("[image.a]\ndepends_on = ['b']\n[image.b]\ndepends_on = ['a']\n", "images need each other: a, b"),
            ("[image.a]\ndepends_on = ['a']\n", "images need each other: a"),
            ("[image.'A b']\n", "\"A b\" is no name of an image"),
            ("[image.a]\nplatforms = ['a/b/c/d']\n", "platforms of image a"),
            ("[image.a]\npath = '-'\n", "path of image a"),
            ("[image.a]\ncontexts = { context = 'x' }\n", "context context of image a"),
            ("[image.a]\ntags = ['x:{what}']\n", "tags of image a"),
            ("[image.a]\nplugins = { build = [] }\n", "unknown field `build`"),
            ("[image.a]\nfiles = ['[']\n", "files of image a"),
            ("[image.a]\nfiles = ['ok', '../**']\n", "files of image a: \"../**\" leads out of the folder"),
            ("[image.a]\nfiles = ['!a/../../b']\n", "files of image a: \"!a/../../b\" leads out of the folder"),
            ("[defaults]\ndepends_on = ['a']\n[image.a]\n", "depends_on in [defaults]"),
        ] {
            let told = project(text).map_or_else(|error| error, |_| String::new());
            assert!(told.contains(expect), "{text}: {told}");
        }
    }

    #[test]
    fn what_needs_trust() {
        for (text, pushes, expect) in [
            ("[image.a]\ntags = ['example.com/a:1']\n", None, ""),
            ("[image.a]\ntags = ['example.com/a:1']\n", Some(Registries::OfTheUser), "where a is pushed to (example.com/a:1)"),
            ("[image.a]\ntags = ['team/a']\n", Some(Registries::OfTheUser), ""),
            ("[image.a]\npath = '../x'\n", None, "path of a (../x)"),
            ("[image.a]\npath = '/etc'\n", None, "path of a (/etc)"),
            ("[image.a]\npath = 'link'\n", None, "path of a (link)"),
            ("[image.a]\npath = 'https://me:pw@h/x.git'\n", None, "path of a (https://***@h/x.git)"),
            ("[image.a]\nfile = 'a/../../D'\n", None, "file of a"),
            ("[image.a]\n[[image.a.plugins.pre_build]]\nname = 'labels'\n", None, ""),
            ("[image.a]\n[[image.a.plugins.exit]]\nname = 'notify'\n", None, "plugin exit:notify of a"),
            ("[image.a]\n[[image.a.plugins.pre_build]]\nname = 'labels'\nfile = 'x'\n", None, "plugin pre_build:labels of a"),
            ("[image.a]\ncontexts = { x = '/' }\n", None, "context x of a"),
            ("[image.a]\ncontexts = { x = 'oci-layout:///x' }\n", None, "context x of a"),
            ("[image.a]\ncontexts = { x = 'docker-image://debian' }\n", None, ""),
            ("[image.a]\npath = 'sub'\n", None, "sub/Dockerfile of a, a link"),
            ("[image.a]\ntags = ['somebody/x:1']\n", Some(Registries::OfTheUser), ""),
            ("[image.a]\ntags = ['somebody/x:1']\n", Some(Registries::DockerHub), "where a is pushed to (somebody/x:1)"),
        ] {
            let (dir, project) = project(text).unwrap();
            std::os::unix::fs::symlink("/etc", dir.path().join("link")).unwrap();
            std::fs::create_dir(dir.path().join("sub")).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", dir.path().join("sub/Dockerfile")).unwrap();
            let told = project.check_trust(&[], pushes).map_or_else(|error| error.message, |()| String::new());
            assert!(told.ends_with(expect) && told.is_empty() == expect.is_empty(), "{text}: {told}");
            assert!(project.check_trust(&[dir.path().to_owned()], pushes).is_ok());
        }
    }
}
