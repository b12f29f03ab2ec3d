//! What came of a build, told to others.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Kind};
use crate::request::{BuildRequest, RemoteUrl};
use crate::workflow::inside::redacted;
use crate::workflow::{Plugin, Scene, Standing, veto};

/// How a build stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum On {
    Ok,
    Failed,
    Cancelled,
}

fn all() -> Vec<On> {
    vec![On::Ok, On::Failed, On::Cancelled]
}

fn standing(scene: &Scene) -> On {
    match scene.standing {
        Standing::Well => On::Ok,
        Standing::Failed(_) => On::Failed,
        Standing::Cancelled => On::Cancelled,
    }
}

/// What is said of the build so far, secrets masked.
fn summary(scene: &Scene) -> Result<Value, Error> {
    let error = match scene.standing {
        Standing::Failed(error) => Value::String(error.clone()),
        _ => Value::Null,
    };
    let images: Vec<Value> = match scene.image.as_deref() {
        None => vec![],
        Some(image) => image
            .platforms
            .iter()
            .map(|(platform, manifest, config)| {
                json!({ "platform": platform.to_string(), "digest": manifest.digest.to_string(), "id": config.to_string() })
            })
            .collect(),
    };
    let plugins = serde_json::to_value(scene.done).map_err(|e| Error::from_chain(Kind::Bug, &e))?;
    let document = json!({
        "version": 1, "outcome": standing(scene), "error": error,
        "digest": scene.image.as_deref().map(|image| image.target.digest.to_string()), "images": images,
        "names": scene.delivered.names, "pushed": scene.delivered.pushed.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "asked": scene.draft.request.names, "git": crate::report::git_of(&scene.draft.request.source, scene.tree), "dockerfile": scene.draft.dockerfile,
        "plugins": plugins,
    });
    Ok(super::super::masked(document, scene.masks))
}

/// Posts what came of the build, as JSON, to an address. Mail is not sent: a webhook of the mail service does that.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Notify {
    /// The address: http or https. Without it the secret of `url_secret` is the address.
    #[serde(default)]
    url: Option<String>,
    /// Id of a granted secret that is the address: for those that are as good as a password.
    #[serde(default)]
    url_secret: Option<String>,
    /// Id of a granted secret that is sent as `Authorization: Bearer`.
    #[serde(default)]
    token_secret: Option<String>,
    /// For which outcomes: ok, failed, cancelled.
    #[serde(default = "all")]
    on: Vec<On>,
}

impl Plugin for Notify {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        if self.url.is_some() == self.url_secret.is_some() {
            return Err("it needs url or url_secret, one of them".into());
        }
        match &self.url {
            Some(url) if !url.starts_with("https://") && !url.starts_with("http://") => {
                Err(format!("{} is no http or https address", redacted(url)))
            }
            Some(url) if RemoteUrl::parse(url).is_some_and(|url| url.split_credentials().0.is_some()) => {
                Err("the address has a password in it: give it with url_secret".into())
            }
            _ => Ok(()),
        }
    }

    fn secrets(&self) -> Vec<&str> {
        self.url_secret.iter().chain(&self.token_secret).map(String::as_str).collect()
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        if !self.on.contains(&standing(scene)) {
            return Ok(json!({ "sent": false }));
        }
        let granted = |id: &String| {
            scene.secrets.get(id).ok_or_else(|| veto(format!("the secret {id:?} was not granted to it: add secret={id} to the plugin")))
        };
        let url = match (&self.url, &self.url_secret) {
            (Some(url), _) => url.clone(),
            (None, Some(id)) => String::from_utf8_lossy(granted(id)?.trim_ascii()).into_owned(),
            (None, None) => return Err(veto("there is no address")),
        };
        let token = self.token_secret.as_ref().map(granted).transpose()?;
        let status = scene.post(&url, &summary(scene)?, token.map(Vec::as_slice))?;
        Ok(json!({ "sent": true, "status": status }))
    }
}

/// Writes what came of the build into a JSON file: digests, names, the Dockerfile, the results of all plugins before.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StoreMetadata {
    /// The file.
    dest: PathBuf,
}

impl Plugin for StoreMetadata {
    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let text = serde_json::to_string_pretty(&summary(scene)?).map_err(|e| Error::from_chain(Kind::Bug, &e))?;
        Ok(json!({ "file": scene.write_text(&self.dest, &(text + "\n"))? }))
    }
}
