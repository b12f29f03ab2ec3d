//! `build.json` of dock (and what atomic-reactor made of it) as a request: every key is honoured or refused by name.
//!
//! It must not know how plugins work: names and arguments go through as they are.

use std::path::{Path, PathBuf};

use ovenbird_oci::regular_file::{self, Links};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::workflow::{Entry, OnFailure, Phase};
use super::{BuildRequest, DockerfileFrom, Output, OutputKind, RemoteUrl, Source};
use crate::error::{Error, Kind};
use crate::settings::Environment;

/// Where dock's containers find it.
pub const DEFAULT_PATH: &str = "/run/share/build.json";
/// The variable that holds it.
pub const DEFAULT_VARIABLE: &str = "BUILD_JSON";

/// Where a build.json is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// This file.
    Path(PathBuf),
    /// This variable.
    Variable(String),
    /// Exactly one of [`DEFAULT_PATH`] and [`DEFAULT_VARIABLE`].
    Auto,
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    git_url: Option<String>,
    image: String,
    #[serde(default)]
    git_dockerfile_path: Option<String>,
    #[serde(default)]
    git_commit: Option<String>,
    #[serde(default)]
    parent_registry: Option<String>,
    #[serde(default)]
    target_registries: Option<Vec<String>>,
    #[serde(default)]
    prebuild_plugins: Option<Vec<Plugin>>,
    #[serde(default)]
    prepublish_plugins: Option<Vec<Plugin>>,
    #[serde(default)]
    postbuild_plugins: Option<Vec<Plugin>>,
    #[serde(default)]
    exit_plugins: Option<Vec<Plugin>>,
    #[serde(default)]
    plugin_files: Option<Vec<Value>>,
    #[serde(default)]
    source: Option<SourceDocument>,
}

/// Keys of a build.json, and of what is in it.
const KEYS: [&str; 12] = [
    "git_url",
    "git_commit",
    "git_dockerfile_path",
    "source",
    "image",
    "parent_registry",
    "target_registries",
    "prebuild_plugins",
    "prepublish_plugins",
    "postbuild_plugins",
    "exit_plugins",
    "plugin_files",
];
const SOURCE_KEYS: [&str; 4] = ["provider", "uri", "dockerfile_path", "provider_params"];
const PARAM_KEYS: [&str; 3] = ["git_commit", "git_branch", "git_commit_depth"];
const PLUGIN_KEYS: [&str; 5] = ["name", "args", "can_fail", "is_allowed_to_fail", "required"];

/// Refuses the first key that is not known, with its place, whatever else is wrong.
fn check_keys(value: &Value) -> Result<(), Error> {
    let check = |place: &str, value: &Value, known: &[&str]| {
        let unknown = value.as_object().into_iter().flatten().find(|(key, _)| !known.contains(&key.as_str()));
        let Some((key, _)) = unknown else { return Ok(()) };
        let key = if place.is_empty() { key.clone() } else { format!("{place}.{key}") };
        let error = wrong(format!("the key {key:?} of the build.json is not supported"));
        let hint = if SOURCE_KEYS.contains(&key.as_str()) {
            format!("it belongs into source: {{\"source\": {{\"{key}\": …}}}}")
        } else {
            format!("known are {}", known.join(", "))
        };
        Err(error.hint(hint))
    };
    check("", value, &KEYS)?;
    check("source", &value["source"], &SOURCE_KEYS)?;
    check("source.provider_params", &value["source"]["provider_params"], &PARAM_KEYS)?;
    for phase in ["prebuild_plugins", "prepublish_plugins", "postbuild_plugins", "exit_plugins"] {
        for (number, plugin) in value[phase].as_array().into_iter().flatten().enumerate() {
            check(&format!("{phase}[{number}]"), plugin, &PLUGIN_KEYS)?;
        }
    }
    Ok(())
}

/// `source` of later versions.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SourceDocument {
    provider: String,
    uri: String,
    #[serde(default)]
    dockerfile_path: Option<String>,
    #[serde(default)]
    provider_params: Params,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
#[expect(clippy::struct_field_names, reason = "the names of the document")]
struct Params {
    git_commit: Option<String>,
    git_branch: Option<String>,
    git_commit_depth: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Plugin {
    name: String,
    #[serde(default)]
    args: Option<Map<String, Value>>,
    #[serde(default, alias = "is_allowed_to_fail")]
    can_fail: bool,
    #[serde(default = "yes")]
    required: bool,
}

fn yes() -> bool {
    true
}

fn wrong(what: impl Into<String>) -> Error {
    Error::new(Kind::Usage, what)
}

/// Longest build.json, in bytes.
const MOST_BYTES: u64 = 4 << 20;

/// Reads the text from where it is.
pub fn read(input: &Input, environment: &Environment) -> Result<String, Error> {
    let file = |path: &Path| {
        regular_file::read_to_string(&environment.absolute(path), MOST_BYTES, Links::Follow)
            .map_err(|e| Error::from_chain(Kind::Usage, &e).while_doing(format!("cannot read the build.json {}", path.display())))
    };
    let variable = |name: &str| environment.get(name).filter(|text| !text.is_empty()).map(str::to_owned);
    match input {
        Input::Path(path) => file(path),
        Input::Variable(name) => {
            variable(name).ok_or_else(|| wrong(format!("there is no build.json in the variable {name}: it is not set")))
        }
        Input::Auto => match (variable(DEFAULT_VARIABLE), Path::new(DEFAULT_PATH).exists()) {
            (Some(text), false) => Ok(text),
            (None, true) => file(Path::new(DEFAULT_PATH)),
            (Some(_), true) => Err(wrong(format!("there are two build.json: {DEFAULT_PATH} and the variable {DEFAULT_VARIABLE}"))
                .hint("name one with --input path or --input env")),
            (None, false) => Err(wrong(format!("there is no build.json: neither {DEFAULT_PATH} nor the variable {DEFAULT_VARIABLE}"))),
        },
    }
}

/// Reads the text of a build.json, with `--substitute` done to it, as a request.
pub fn parse(text: &str, substitutions: &[String]) -> Result<BuildRequest, Error> {
    let unreadable = |e: serde_json::Error| wrong("the build.json cannot be used").because(e.to_string());
    let mut value: Value = serde_json::from_str(text).map_err(unreadable)?;
    substitutions.iter().try_for_each(|one| substitute(&mut value, one))?;
    check_keys(&value)?;
    let document: Document = serde_json::from_value(value).map_err(unreadable)?;
    if document.plugin_files.as_ref().is_some_and(|files| !files.is_empty()) {
        return Err(wrong("the key \"plugin_files\" of the build.json is not supported: files of Python classes are not loaded")
            .hint("make each plugin a program (docs/guides/plugins.md) and put it on the PATH as ovenbird-plugin-NAME"));
    }
    let mut request = BuildRequest::new(Source::Path(".".into()));
    (request.source, request.dockerfile) = source(&document)?;
    names(&mut request, &document);
    if let Some(registry) = document.parent_registry.as_deref().filter(|registry| !registry.is_empty()) {
        // Images without a registry come from there; others are an error.
        let mut change = Entry::new("change-from");
        change.args.insert("images".into(), Value::Object(Map::new()));
        change.args.insert("registries".into(), serde_json::json!({ "docker.io": registry }));
        let mut allowed = Entry::new("allowed-parents");
        allowed.args.insert("allowed".into(), serde_json::json!([format!("{registry}/**")]));
        request.workflow.pre_build.extend([change, allowed]);
    }
    let phases = [
        (Phase::PreBuild, document.prebuild_plugins),
        (Phase::PrePublish, document.prepublish_plugins),
        (Phase::PostBuild, document.postbuild_plugins),
        (Phase::Exit, document.exit_plugins),
    ];
    for (phase, plugins) in phases {
        for plugin in plugins.into_iter().flatten() {
            let mut entry = Entry::new(plugin.name);
            entry.args = plugin.args.unwrap_or_default();
            entry.on_failure = if plugin.can_fail { OnFailure::Warn } else { OnFailure::Fail };
            entry.required = plugin.required;
            request.workflow.push(phase, entry);
        }
    }
    Ok(request)
}

fn names(request: &mut BuildRequest, document: &Document) {
    let registries: Vec<&String> = document.target_registries.iter().flatten().filter(|registry| !registry.is_empty()).collect();
    if registries.is_empty() {
        request.names = vec![document.image.clone()];
        return;
    }
    let bare = |registry: &str| {
        let text = registry.strip_prefix("https://").or_else(|| registry.strip_prefix("http://")).unwrap_or(registry);
        text.trim_end_matches('/').to_owned()
    };
    request.names = registries.iter().map(|registry| format!("{}/{}", bare(registry), document.image)).collect();
    request.outputs.push(Output::new(OutputKind::Registry));
}

/// The repository, and the Dockerfile in it. As in dock the context is the folder of the Dockerfile.
fn source(document: &Document) -> Result<(Source, DockerfileFrom), Error> {
    let (address, commit, dockerfile, is_path) = match (&document.git_url, &document.source) {
        (Some(_), Some(_)) => return Err(wrong("the build.json has both git_url and source")),
        (None, None) => return Err(wrong("the build.json has no source: it needs git_url or source")),
        (Some(url), None) => (url, document.git_commit.clone(), document.git_dockerfile_path.clone(), false),
        (None, Some(source)) => {
            if document.git_commit.is_some() || document.git_dockerfile_path.is_some() {
                return Err(wrong("the build.json has git_commit or git_dockerfile_path beside source, where they belong into source"));
            }
            if source.provider_params.git_commit_depth.is_some() {
                return Err(wrong("git_commit_depth in the source of the build.json is not supported: only the commit itself is fetched"));
            }
            let is_path = match source.provider.as_str() {
                "git" => false,
                "path" => true,
                other => {
                    return Err(wrong(format!("the source provider {other:?} of the build.json is not supported: expected git or path")));
                }
            };
            let params = &source.provider_params;
            (&source.uri, params.git_commit.clone().or_else(|| params.git_branch.clone()), source.dockerfile_path.clone(), is_path)
        }
    };
    if address.is_empty()
        || address.starts_with('-')
        || commit.as_ref().is_some_and(|commit| commit.starts_with('-') || commit.contains([':', '#']))
    {
        return Err(wrong("the source of the build.json has no usable address or commit"));
    }
    let inside = dockerfile.as_deref().unwrap_or_default().trim_matches('/');
    if Path::new(inside).components().any(|part| !matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir))
        || inside.contains(['#', ':'])
    {
        return Err(wrong(format!("the Dockerfile {inside:?} of the build.json is not inside the repository")));
    }
    // `path`, or `path/Dockerfile`.
    let folder = match Path::new(inside).file_name().and_then(|name| name.to_str()) {
        Some("Dockerfile") => Path::new(inside).parent().unwrap_or(Path::new("")).to_owned(),
        Some(name) if name.contains("Dockerfile") => {
            return Err(wrong(format!("the Dockerfile {inside:?} of the build.json is not supported: it must be named Dockerfile")));
        }
        _ => PathBuf::from(inside),
    };
    if is_path || (!address.contains("://") && !address.starts_with("git@") && commit.is_none()) {
        let plain = address.strip_prefix("file://").unwrap_or(address);
        if commit.is_some() {
            return Err(wrong("the build.json has a commit for a source that is a folder"));
        }
        return Ok((Source::Path(Path::new(plain).join(folder)), DockerfileFrom::Default));
    }
    let address = if address.contains("://") || address.starts_with("git@") { address.clone() } else { format!("file://{address}") };
    let fragment = match (commit, folder.to_str().filter(|folder| !folder.is_empty())) {
        (None, None) => String::new(),
        (commit, folder) => format!("#{}{}", commit.unwrap_or_default(), folder.map(|folder| format!(":{folder}")).unwrap_or_default()),
    };
    let url = RemoteUrl::parse(&format!("{address}{fragment}"));
    let url = url.ok_or_else(|| wrong("the source of the build.json is no address of a repository that can be fetched"))?;
    Ok((Source::Remote(url), DockerfileFrom::Default))
}

/// `key=value`, or `prebuild_plugins.NAME.ARGUMENT=value`.
fn substitute(document: &mut Value, text: &str) -> Result<(), Error> {
    let expected = || {
        wrong(format!(
            "--substitute {text:?}: expected KEY=VALUE or PLUGINS.NAME.ARGUMENT=VALUE, for example prebuild_plugins.labels.set={{}}"
        ))
    };
    let (key, value) = text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or_else(expected)?;
    let value: Value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
    let object = document.as_object_mut().ok_or_else(|| wrong("the build.json is no object"))?;
    let mut parts = key.splitn(3, '.');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(key), None, None) => {
            object.insert(key.to_owned(), value);
            Ok(())
        }
        (Some(kind), Some(name), Some(argument)) => {
            let plugins = object.get_mut(kind).and_then(Value::as_array_mut);
            let plugin = plugins.into_iter().flatten().find(|plugin| plugin.get("name").and_then(Value::as_str) == Some(name));
            let plugin = plugin.and_then(Value::as_object_mut);
            let plugin = plugin.ok_or_else(|| wrong(format!("--substitute {text:?}: the build.json has no plugin {name:?} in {kind}")))?;
            let args = plugin.entry("args").or_insert_with(|| Value::Object(Map::new()));
            let args =
                args.as_object_mut().ok_or_else(|| wrong(format!("--substitute {text:?}: the arguments of {name} are no object")))?;
            args.insert(argument.to_owned(), value);
            Ok(())
        }
        _ => Err(expected()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str, substitutions: &[&str]) -> String {
        let substitutions: Vec<String> = substitutions.iter().map(|s| (*s).to_owned()).collect();
        match parse(text, &substitutions) {
            Ok(request) => {
                let plugins: Vec<String> = Phase::ALL
                    .into_iter()
                    .flat_map(|phase| request.workflow.entries(phase).iter().map(move |e| format!("{phase}:{} {:?}", e.name, e.on_failure)))
                    .collect();
                let source = match &request.source {
                    Source::Remote(url) => format!("Remote({:?})", url.expose()),
                    other => format!("{other:?}"),
                };
                format!("{source} {:?} {} {}", request.names, request.outputs.len(), plugins.join(", "))
            }
            Err(error) => format!("! {error}"),
        }
    }

    #[test]
    fn every_key_counts() {
        for (text, substitutions, expect) in [
            (r#"{"git_url":"https://h/r.git","image":"a:1"}"#, &[][..], r#"Remote("https://h/r.git") ["a:1"] 0 "#),
            (
                r#"{"git_url":"https://h/r.git","image":"a","git_commit":"abc","git_dockerfile_path":"x/Dockerfile","target_registries":["r.io","http://s:5000/"]}"#,
                &[],
                r#"Remote("https://h/r.git#abc:x") ["r.io/a", "s:5000/a"] 1 "#,
            ),
            (r#"{"git_url":"/repo","image":"a","git_dockerfile_path":"d"}"#, &[], r#"Path("/repo/d") ["a"] 0 "#),
            (r#"{"git_url":"/repo","image":"a","git_commit":"v1"}"#, &[], r#"Remote("file:///repo#v1") ["a"] 0 "#),
            (
                r#"{"source":{"provider":"git","uri":"ssh://h/r","provider_params":{"git_branch":"main"}},"image":"a"}"#,
                &[],
                r#"Remote("ssh://h/r#main")"#,
            ),
            (
                r#"{"git_url":"https://h/r","image":"a","parent_registry":"p.io","prebuild_plugins":[{"name":"x","can_fail":true}],"postbuild_plugins":[{"name":"y","args":{"k":1}}],"exit_plugins":[{"name":"z","is_allowed_to_fail":true}]}"#,
                &["image=b", "postbuild_plugins.y.k=2"],
                r#"Remote("https://h/r") ["b"] 0 pre_build:change-from Fail, pre_build:allowed-parents Fail, pre_build:x Warn, post_build:y Fail, exit:z Warn"#,
            ),
            (
                r#"{"git_url":"https://h/r","image":"a","build_timeout":1}"#,
                &[],
                "! the key \"build_timeout\" of the build.json is not supported",
            ),
            (r#"{"git_url":"https://h/r","image":"a","plugin_files":["p.py"]}"#, &[], "! the key \"plugin_files\""),
            (
                r#"{"git_url":"https://h/r","image":"a","prebuild_plugins":[{"args":{}}]}"#,
                &[],
                "! the build.json cannot be used: missing field `name`",
            ),
            (
                r#"{"git_url":"https://h/r","image":"a","prebuild_plugins":[{"name":"x","arg":{}}]}"#,
                &[],
                "! the key \"prebuild_plugins[0].arg\" of the build.json is not supported",
            ),
            (r#"{"image":"a"}"#, &[], "! the build.json has no source"),
            (r#"{"git_url":"https://h/r"}"#, &[], "! the build.json cannot be used: missing field `image`"),
            (r#"{"git_url":"https://h/r","image":"a","git_dockerfile_path":"../x"}"#, &[], "! the Dockerfile \"../x\""),
            (r#"{"git_url":"--upload-pack=x","image":"a"}"#, &[], "! the source of the build.json has no usable address"),
            (
                r#"{"git_url":"https://h/r","image":"a"}"#,
                &["prebuild_plugins.x.k=v"],
                "! --substitute \"prebuild_plugins.x.k=v\": the build.json has no plugin",
            ),
            (r#"{"git_url":"https://h/r","image":"a"}"#, &["image"], "! --substitute \"image\": expected"),
            (r#"{"source":{"provider":"svn","uri":"x"},"image":"a"}"#, &[], "! the source provider \"svn\""),
        ] {
            let got = told(text, substitutions);
            assert!(got.starts_with(expect), "{text}: {got}");
        }
    }
}
