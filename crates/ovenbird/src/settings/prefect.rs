//! Which Prefect server is meant, and who asks: flags, Prefect's own variables, `[prefect]` of the settings, Prefect's profile.
//!
//! An API key goes to the address that it was given with and to no other: a key of the environment is for the address of the environment.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ovenbird_oci::keychain::Secret;
use ovenbird_oci::regular_file::{self, Links};
use serde::Deserialize;

use super::file::over;
use super::{Environment, Settings};
use crate::error::{Error, Kind};
use crate::launch::prefect::{Authority, PrefectPlace, PrefectServer};

/// Longest file of Prefect's profiles, and longest key, in bytes.
const MAX: u64 = 1 << 20;

/// `[prefect]`, and `[prefect.servers."ADDRESS"]` for one address.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrefectSettings {
    address: Option<String>,
    api_key_env: Option<String>,
    api_key_file: Option<PathBuf>,
    auth_env: Option<String>,
    auth_file: Option<PathBuf>,
    ca: Option<PathBuf>,
    pool: Option<String>,
    queue: Option<String>,
    image: Option<String>,
    sources: Option<String>,
    servers: BTreeMap<String, PrefectSettings>,
}

/// What one place says of a server.
struct Said {
    address: Option<String>,
    authority: Option<Authority>,
    ca: Option<PathBuf>,
    from: String,
}

impl PrefectSettings {
    /// Lays `other` over this.
    pub(super) fn merge(&mut self, other: Self) {
        // A key belongs to its address: another address takes it away.
        if other.address.is_some() && other.address != self.address {
            (self.api_key_env, self.api_key_file, self.auth_env, self.auth_file) = (None, None, None, None);
        }
        over(&mut self.address, other.address);
        over(&mut self.api_key_env, other.api_key_env);
        over(&mut self.api_key_file, other.api_key_file);
        over(&mut self.auth_env, other.auth_env);
        over(&mut self.auth_file, other.auth_file);
        over(&mut self.ca, other.ca);
        over(&mut self.pool, other.pool);
        over(&mut self.queue, other.queue);
        over(&mut self.image, other.image);
        over(&mut self.sources, other.sources);
        for (address, server) in other.servers {
            self.servers.entry(address).or_default().merge(server);
        }
    }

    /// Paths in a file are seen from the folder of the file.
    pub(super) fn rebase(&mut self, dir: &Path) {
        for path in [&mut self.api_key_file, &mut self.auth_file, &mut self.ca].into_iter().flatten() {
            *path = dir.join(&*path);
        }
        self.servers.values_mut().for_each(|server| server.rebase(dir));
    }

    /// Why it cannot be used.
    pub(super) fn check(&self) -> Result<(), String> {
        for (address, server) in &self.servers {
            parse(address).map_err(|error| error.to_string())?;
            if server.address.is_some() || !server.servers.is_empty() {
                return Err(format!("prefect.servers.{address:?} has an address of its own, or servers"));
            }
        }
        if let Some(address) = &self.address {
            parse(address).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn authority(&self, environment: &Environment) -> Result<Option<Authority>, Error> {
        let secret = |variable: &Option<String>, file: &Option<PathBuf>, key: &str| -> Result<Option<Secret>, Error> {
            match (variable, file) {
                (Some(variable), _) => match environment.get(variable).filter(|value| !value.is_empty()) {
                    Some(value) => Ok(Some(Secret::new(value.to_owned()))),
                    None => {
                        Err(Error::new(Kind::Configuration, format!("the variable {variable} of the setting prefect.{key}_env is not set")))
                    }
                },
                (None, Some(file)) => {
                    let text = regular_file::read_to_string(file, MAX, Links::Follow).map_err(|error| {
                        Error::from_chain(Kind::Configuration, &error)
                            .while_doing(format!("cannot read {} of the setting prefect.{key}_file", file.display()))
                    })?;
                    Ok(Some(Secret::new(text.trim().to_owned())))
                }
                (None, None) => Ok(None),
            }
        };
        Ok(match secret(&self.api_key_env, &self.api_key_file, "api_key")? {
            Some(key) => Some(Authority::Key(key)),
            None => secret(&self.auth_env, &self.auth_file, "auth")?.map(Authority::Basic),
        })
    }
}

/// An address as it is compared: without a slash at its end.
fn parse(address: &str) -> Result<String, Error> {
    let wrong = |why: &str| {
        // It may have a password in it.
        let shown = address.rsplit_once('@').map_or_else(|| address.to_owned(), |(_, host)| format!("***@{host}"));
        Error::new(Kind::Configuration, format!("{shown:?} is not the address of a Prefect server: {why}"))
            .hint("it looks like http://HOST:4200/api, or https://api.prefect.cloud/api/accounts/…/workspaces/…")
    };
    let url = reqwest::Url::parse(address).map_err(|error| wrong(&error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(wrong("expected http:// or https://"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("a password has no place in it; use PREFECT_API_AUTH_STRING, or auth_file in the settings"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("nothing can follow its path"));
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

fn of_variables(get: impl Fn(&str) -> Option<String>, from: &str) -> Said {
    let authority = match (get("PREFECT_API_KEY"), get("PREFECT_API_AUTH_STRING")) {
        (Some(key), _) => Some(Authority::Key(Secret::new(key))),
        (None, Some(auth)) => Some(Authority::Basic(Secret::new(auth))),
        (None, None) => None,
    };
    let ca = get("PREFECT_API_SSL_CERT_FILE").map(PathBuf::from);
    Said { address: get("PREFECT_API_URL"), authority, ca, from: from.to_owned() }
}

/// The profile that `prefect cloud login` and `prefect config set` write.
fn of_profile(environment: &Environment) -> Said {
    let nothing = Said { address: None, authority: None, ca: None, from: String::new() };
    let home = environment.get("PREFECT_HOME").map(PathBuf::from).or_else(|| Some(environment.home()?.join(".prefect")));
    let path = environment.get("PREFECT_PROFILES_PATH").map(PathBuf::from).or_else(|| Some(home?.join("profiles.toml")));
    let text = path.and_then(|path| regular_file::read_to_string(&path, MAX, Links::Follow).ok());
    let Some(table) = text.and_then(|text| toml::from_str::<toml::Table>(&text).ok()) else { return nothing };
    let Some(name) = environment.get("PREFECT_PROFILE").or_else(|| table.get("active")?.as_str()) else { return nothing };
    let Some(profile) = table.get("profiles").and_then(|profiles| profiles.get(name)) else { return nothing };
    of_variables(|key| profile.get(key)?.as_str().map(str::to_owned), &format!("Prefect's profile {name:?}"))
}

impl Settings {
    /// The Prefect server that is meant; `None`: none is named anywhere.
    pub fn prefect(&self, place: &PrefectPlace, environment: &Environment) -> Result<Option<PrefectServer>, Error> {
        let set = |name: &str| environment.get(name).filter(|value| !value.is_empty()).map(str::to_owned);
        let own = &self.prefect;
        let of_settings =
            Said { address: own.address.clone(), authority: own.authority(environment)?, ca: own.ca.clone(), from: "the settings".into() };
        let mut all = vec![of_variables(set, "PREFECT_API_URL"), of_settings];
        let named = |all: &[Said]| all.iter().find_map(|said| Some((said.address.clone()?, said.from.clone())));
        let chosen = match &place.address {
            Some(address) => Some((address.clone(), "--on".to_owned())),
            None => named(&all),
        };
        // Only then: reading it is work.
        if chosen.is_none() {
            all.push(of_profile(environment));
        }
        let Some((address, from)) = chosen.or_else(|| named(&all)) else { return Ok(None) };
        let address = parse(&address)?;
        let server = own.servers.iter().find(|(known, _)| parse(known).is_ok_and(|known| known == address)).map(|(_, server)| server);
        // One without an address is for any, but for that of a profile, which is a whole.
        let fits = |said: &&Said| said.address.as_deref().is_none_or(|own| parse(own).is_ok_and(|own| own == address));
        let of_server = server.map(|server| server.authority(environment)).transpose()?.flatten();
        let authority = of_server.or_else(|| all.iter().filter(fits).find_map(|said| said.authority.clone()));
        let ca = server.and_then(|server| server.ca.clone()).or_else(|| all.iter().filter(fits).find_map(|said| said.ca.clone()));
        let pick = |said: &Option<String>, get: fn(&PrefectSettings) -> &Option<String>| {
            said.clone().or_else(|| get(server?).clone()).or_else(|| get(own).clone())
        };
        Ok(Some(PrefectServer {
            address,
            from,
            authority,
            ca,
            pool: pick(&place.pool, |settings| &settings.pool),
            queue: pick(&place.queue, |settings| &settings.queue),
            image: pick(&place.image, |settings| &settings.image),
            sources: pick(&None, |settings| &settings.sources),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Overrides;

    #[test]
    fn which_server_and_who() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        let profile = "active = \"cloud\"\n[profiles.cloud]\nPREFECT_API_URL = \"https://cloud.test/api/\"\nPREFECT_API_KEY = \"pk\"\n[profiles.other]\nPREFECT_API_URL = \"http://other.test/api\"\n";
        std::fs::write(dir.path().join("profiles.toml"), profile).unwrap();
        std::fs::write(dir.path().join("key"), "fk\n").unwrap();
        let home = dir.path().display().to_string();
        let settings = "[prefect]\naddress='http://file.test/api'\napi_key_file='key'\npool='a'\nsources='r.test/s'\n[prefect.servers.\"http://env.test/api/\"]\npool='b'\nqueue='q'\n";
        for (text, variables, on, expect) in [
            ("", &[][..], "prefect", "none"),
            ("", &[("PREFECT_HOME", home.as_str())], "prefect", "https://cloud.test/api key:pk - - -"),
            ("", &[("PREFECT_HOME", home.as_str()), ("PREFECT_PROFILE", "other")], "prefect", "http://other.test/api - - - -"),
            ("", &[("PREFECT_API_URL", "http://env.test/api")], "prefect", "http://env.test/api - - - -"),
            (
                "",
                &[("PREFECT_API_URL", "http://env.test/api"), ("PREFECT_API_AUTH_STRING", "u:p")],
                "prefect,pool=x",
                "http://env.test/api basic:u:p x - -",
            ),
            (settings, &[], "prefect", "http://file.test/api key:fk a - r.test/s"),
            (settings, &[], "prefect,pool=z,queue=y", "http://file.test/api key:fk z y r.test/s"),
            // The key of the file is for the address of the file.
            (settings, &[("PREFECT_API_URL", "http://env.test/api")], "prefect", "http://env.test/api - b q r.test/s"),
            (
                settings,
                &[("PREFECT_API_URL", "http://env.test/api"), ("PREFECT_API_KEY", "ek")],
                "prefect",
                "http://env.test/api key:ek b q r.test/s",
            ),
            (
                settings,
                &[("PREFECT_API_URL", "http://env.test/api"), ("PREFECT_API_KEY", "ek")],
                "prefect,address=http://new.test/api",
                "http://new.test/api - a - r.test/s",
            ),
            (
                "[prefect]\naddress='http://file.test/api'\napi_key_env='NONE'",
                &[],
                "prefect",
                "! the variable NONE of the setting prefect.api_key_env is not set",
            ),
            (
                "",
                &[("PREFECT_API_URL", "http://u:pw@h/api")],
                "prefect",
                "! \"***@h/api\" is not the address of a Prefect server: a password",
            ),
            ("", &[("PREFECT_API_URL", "ftp://h/api")], "prefect", "! \"ftp://h/api\" is not the address"),
            ("[prefect]\naddress='x'", &[], "prefect", "! the setting prefect cannot be used: \"x\" is not the address"),
            ("[prefect]\nkey='x'", &[], "prefect", "unknown field `key`"),
        ] {
            std::fs::write(&file, text).unwrap();
            let mut variables: BTreeMap<String, String> = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            variables.insert("HOME".into(), "/nowhere".into());
            let environment = Environment::fixed(variables, "/", None);
            let flags = Overrides { file: Some(file.clone()), ..Overrides::default() };
            let crate::choice::On::Prefect(place) = on.parse().unwrap() else { panic!("{on}") };
            let got = match Settings::load(&environment, &flags).and_then(|settings| settings.prefect(&place, &environment)) {
                Ok(None) => "none".to_owned(),
                Ok(Some(server)) => {
                    let authority = match &server.authority {
                        None => "-".to_owned(),
                        Some(Authority::Key(key)) => format!("key:{}", key.expose()),
                        Some(Authority::Basic(auth)) => format!("basic:{}", auth.expose()),
                    };
                    let or = |text: &Option<String>| text.clone().unwrap_or("-".into());
                    format!("{} {authority} {} {} {}", server.address, or(&server.pool), or(&server.queue), or(&server.sources))
                }
                Err(error) => format!("! {error}"),
            };
            assert!(got.contains(expect), "{text:?} {on}: {got}");
        }
    }
}
