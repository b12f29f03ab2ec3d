//! `ovenbird auth`.

use clap::{Args, Subcommand};
use ovenbird::{Error, Kind};
use ovenbird_oci::keychain::Origin;
use ovenbird_oci::registry::{Access, Client, Verdict};

use crate::args::Format;
use crate::session::Session;

/// Who you are to a registry.
#[derive(Debug, Args)]
pub(crate) struct AuthArgs {
    #[command(subcommand)]
    command: AuthCommand,
}

#[derive(Debug, Subcommand)]
enum AuthCommand {
    /// Show which source gave the credential for a repository, as whom, what it may do there, and until when. Changes nothing
    Check(CheckArgs),
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// Repository: HOST/REPOSITORY
    repository: String,
    /// Ask for the right to push, too, with an upload that is cancelled again
    #[arg(long)]
    push: bool,
    /// How the answer is written
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// The answer for programs. Version 1.
#[derive(serde::Serialize)]
struct Report<'a> {
    version: u32,
    registry: &'a str,
    repository: &'a str,
    address: &'a str,
    /// None: anonymous.
    source: Option<&'a Origin>,
    username: Option<&'a str>,
    expires: Option<String>,
    pull: &'static str,
    push: Option<&'static str>,
}

pub(crate) fn run(args: &AuthArgs, session: &Session) -> Result<(), Error> {
    let AuthCommand::Check(args) = &args.command;
    if is_host(&args.repository) {
        return Err(Error::new(Kind::Usage, format!("{} is a registry, and rights are those of a repository in it", args.repository))
            .hint(format!("write HOST/REPOSITORY: {}/NAME", args.repository.trim_end_matches('/'))));
    }
    let repository = session.settings.reference(&args.repository)?;
    let client = Client::new(session.settings.client_options());
    let access = super::logout::block_on(async { Ok(client.check_access(&repository, args.push).await?) })?;
    let expires = access.expires.and_then(|end| jiff::Timestamp::try_from(end).ok()).map(|end| format!("{end:.0}"));
    crate::print(&match args.format {
        Format::Json => super::json(&Report {
            version: 1,
            registry: repository.registry(),
            repository: repository.repository(),
            address: &access.address,
            source: access.origin.as_ref(),
            username: access.username.as_deref(),
            expires,
            pull: word(&access.pull),
            push: access.push.as_ref().map(word),
        })?,
        Format::Text => text(&access, repository.registry(), repository.repository(), expires.as_deref()),
    })?;
    // An answer that is a refusal is a failure for scripts.
    let Some((what, why)) = refusal(&access) else { return Ok(()) };
    let name = format!("{}/{}", repository.registry(), repository.repository());
    let error = Error::new(Kind::Registry, format!("{name} does not let you {what}")).because(why);
    Err(match &access.origin {
        None => error.hint(format!("log in with `ovenbird login {}`, or set a source of credentials for it", repository.registry())),
        Some(origin) => error.hint(format!("the credential is from {origin}: ask for access for it, or use another one")),
    })
}

/// Whether it is a registry's name alone. As a name of an image `127.0.0.1:5000` would be the tag 5000 on Docker Hub.
fn is_host(text: &str) -> bool {
    let host = text.trim_end_matches('/');
    let (name, port) = host.rsplit_once(':').unwrap_or((host, ""));
    let is_port = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    !host.contains(['/', '@', '{']) && (is_port || host == "localhost" || name.contains(['.', '[']))
}

fn word(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Allowed => "allowed",
        Verdict::Missing => "no-repository",
        Verdict::Refused(_) => "refused",
    }
}

fn refusal(access: &Access) -> Option<(&'static str, &str)> {
    match (&access.pull, &access.push) {
        (Verdict::Refused(why), _) => Some(("pull", why)),
        (_, Some(Verdict::Refused(why))) => Some(("push", why)),
        _ => None,
    }
}

fn text(access: &Access, registry: &str, repository: &str, expires: Option<&str>) -> String {
    let say = |verdict: &Verdict| match verdict {
        Verdict::Allowed => "allowed",
        Verdict::Missing => "not refused; the repository is not there",
        Verdict::Refused(_) => "refused",
    };
    let mut lines = vec![
        ("repository", format!("{registry}/{repository}")),
        ("asked at", access.address.clone()),
        ("credential", access.origin.as_ref().map_or_else(|| "none: anonymous".into(), ToString::to_string)),
    ];
    if access.origin.is_some() {
        lines.push(("user", access.username.clone().unwrap_or_else(|| "not said: a token".into())));
        lines.push(("until", expires.unwrap_or("not said").to_owned()));
    }
    lines.push(("pull", say(&access.pull).into()));
    lines.push(("push", access.push.as_ref().map_or_else(|| "not asked (--push)".into(), |push| say(push).into())));
    lines.iter().fold(String::new(), |text, (name, value)| text + &format!("{name:<11} {value}\n"))
}

#[cfg(test)]
mod tests {
    use super::is_host;

    #[test]
    fn a_registry_alone() {
        for host in ["127.0.0.1:5000", "localhost", "localhost:5000", "r.test", "r.test/", "[::1]:5000", "[::1]", "registry:5000"] {
            assert!(is_host(host), "{host}");
        }
        for name in ["busybox", "busybox:latest", "team/app", "r.test/app", "localhost:5000/app", "busybox@sha256:00"] {
            assert!(!is_host(name), "{name}");
        }
    }
}
