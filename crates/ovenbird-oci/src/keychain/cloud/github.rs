//! GitHub's registry with the token of a workflow, or of its user.
//! Source: GitHub's "Working with the Container registry".

use super::super::{Credential, Found, Origin, Secret};

/// GitHub.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GithubOptions {
    /// Name of a variable and the token in it.
    pub token: Option<(String, Secret)>,
    /// Who runs the workflow.
    pub actor: Option<String>,
}

pub(super) fn is_host(registry: &str) -> bool {
    registry == "ghcr.io"
}

/// `None`: there is no token.
pub(super) fn find(options: &GithubOptions) -> Option<Found> {
    let (variable, token) = options.token.as_ref()?;
    // The registry looks at the token only, but wants some name.
    let username = options.actor.clone().unwrap_or_else(|| "x-access-token".into());
    let credential = Credential::Password { username, password: token.clone() };
    Some(Found::new(credential, Origin::Github { variable: variable.clone() }))
}
