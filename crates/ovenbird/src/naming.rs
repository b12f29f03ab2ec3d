//! From the names of a request, with their variables and the tag policy, to the names of its image.

mod version;

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_oci::Reference;
use ovenbird_oci::publish::{TagClass, Target};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind};
use crate::request::tag::{TagPolicy, Template, TemplateError, Values, Variable, tag_of};
use crate::request::{BuildRequest, Output, Source};
use crate::source::{Revision, git};

pub use version::Version;

/// Tag policies: that of all registries, and those of some.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagPolicies {
    /// For registries without one of their own.
    pub all: TagPolicy,
    /// By registry name.
    pub registries: BTreeMap<String, TagPolicy>,
}

impl TagPolicies {
    /// These, and what a request says on top.
    fn with(&self, more: &TagPolicy) -> Self {
        let mut all = self.clone();
        for policy in std::iter::once(&mut all.all).chain(all.registries.values_mut()) {
            policy.unique.extend(more.unique.iter().cloned());
            policy.primary.extend(more.primary.iter().cloned());
            policy.floating.extend(more.floating.iter().cloned());
        }
        all
    }

    fn of(&self, registry: &str) -> &TagPolicy {
        self.registries.get(registry).filter(|policy| !policy.is_empty()).unwrap_or(&self.all)
    }
}

/// One name as asked for.
#[derive(Debug, Clone)]
struct Given {
    template: Template,
    class: TagClass,
    /// From the policy: left out when a variable in it stands for nothing.
    optional: bool,
}

/// All names of a request.
#[derive(Debug)]
pub(crate) struct Naming {
    names: Vec<Given>,
    /// Of each output that has names of its own.
    outputs: Vec<Vec<Given>>,
    /// Of the caches, in the order of [`BuildRequest::cache_references`].
    caches: Vec<Template>,
    values: Values,
}

/// The names, all variables replaced.
#[derive(Debug)]
pub(crate) struct Named {
    /// The request with them.
    pub(crate) request: BuildRequest,
    classes: BTreeMap<String, TagClass>,
    /// What the image is: the git tag, or a name of a release.
    pub(crate) version: Option<Version>,
}

impl Named {
    /// What an output publishes, each name once.
    pub(crate) fn targets(&self, output: &Output) -> Result<Vec<Target>, Error> {
        let mut targets: Vec<Target> = vec![];
        for text in self.request.names_of(Some(output)) {
            let target = Target { reference: self.request.reference(text)?, class: self.classes.get(text).copied().unwrap_or_default() };
            if !targets.iter().any(|known| known.reference == target.reference) {
                targets.push(target);
            }
        }
        Ok(targets)
    }
}

impl From<TemplateError> for Error {
    fn from(error: TemplateError) -> Self {
        let kind = if matches!(error, TemplateError::Missing { .. }) { Kind::Source } else { Kind::Usage };
        Self::from_chain(kind, &error)
    }
}

impl Naming {
    /// Reads the names.
    pub(crate) fn new(request: &BuildRequest, policies: &TagPolicies) -> Result<Self, Error> {
        let policies = &policies.with(&request.tags);
        let all = |names: &[String]| -> Result<Vec<Given>, Error> {
            let mut given = vec![];
            for name in names {
                given.extend(read(name, policies)?);
            }
            Ok(given)
        };
        let outputs = request.outputs.iter().map(|output| all(&output.names)).collect::<Result<_, _>>()?;
        let mut caches = vec![];
        for name in request.clone().cache_references() {
            let template = Template::parse(name)?;
            if template.variables().any(|variable| matches!(variable, Variable::Label(_))) {
                return Err(Error::new(Kind::Usage, format!("{name:?}: a cache is read before the image has labels"))
                    .hint("name it with {git.branch}, {git.sha}, {date} or {id}"));
            }
            caches.push(template);
        }
        Ok(Self { names: all(&request.names)?, outputs, caches, values: Values::default() })
    }

    fn all(&self) -> impl Iterator<Item = &Given> {
        self.names.iter().chain(self.outputs.iter().flatten())
    }

    fn variables(&self) -> impl Iterator<Item = &Variable> {
        self.all().map(|given| &given.template).chain(&self.caches).flat_map(Template::variables)
    }

    fn has(&self, wanted: impl Fn(&Variable) -> bool) -> bool {
        self.variables().any(wanted)
    }

    /// Is the content id in a name?
    pub(crate) fn has_id(&self) -> bool {
        self.has(|variable| *variable == Variable::Id)
    }

    /// Is a label in a name?
    pub(crate) fn has_labels(&self) -> bool {
        self.has(|variable| matches!(variable, Variable::Label(_)))
    }

    /// Finds out what can be known before the content id: the day, and what git says.
    pub(crate) fn look_around(&mut self, request: &BuildRequest, revision: Option<&Revision>, now: i64) {
        let epoch = request.build_args.get("SOURCE_DATE_EPOCH").and_then(|text| text.parse().ok());
        let day = jiff::Timestamp::from_second(epoch.unwrap_or(now)).map(|time| time.strftime("%Y%m%d").to_string());
        self.values.set(Variable::Date, day.map_err(|_| "the time is out of range".into()));
        if !self.has(Variable::is_git) {
            return;
        }
        let head = match (&request.source, revision) {
            (_, Some(Revision { commit, branch, tag, .. })) => {
                Ok(git::Head { sha: commit.clone(), branch: branch.clone(), tag: tag.clone() })
            }
            (Source::Path(dir), None) => git::head(dir).map_err(|error| error.to_string()),
            (Source::Stdin | Source::Remote(_), None) => Err("the context is no folder, so it is in no git repository".into()),
        };
        let of = |get: &dyn Fn(&git::Head) -> Option<String>, none: &str| match &head {
            Ok(head) => get(head).ok_or_else(|| none.to_owned()),
            Err(error) => Err(error.clone()),
        };
        self.values.set(Variable::GitSha, of(&|head| Some(head.sha.clone()), ""));
        self.values.set(Variable::GitShort, of(&|head| Some(head.short().to_owned()), ""));
        let detached = "no branch is checked out (the head is detached, as in many CI systems); write the name of the branch";
        self.values.set(Variable::GitBranch, of(&|head| head.branch.clone(), detached));
        self.values.set(Variable::GitTag, of(&|head| head.tag.clone(), "the commit has no tag"));
        let line = |count: usize| {
            let of_release = |head: &git::Head| Some(Version::parse(head.tag.as_deref()?).filter(Version::is_release)?.line(count));
            of(&of_release, "the commit has no tag that is the version of a release, such as v1.2.3")
        };
        self.values.set(Variable::GitMajor, line(1));
        self.values.set(Variable::GitMinor, line(2));
    }

    /// What was found out, for somebody who cannot look.
    pub(crate) fn values(&self) -> &Values {
        &self.values
    }

    /// Says what somebody else found out, instead of [`Self::look_around`].
    pub(crate) fn set_values(&mut self, values: Values) {
        self.values = values;
    }

    /// Says the content id.
    pub(crate) fn set_id(&mut self, id: &str) {
        self.values.set(Variable::Id, Ok(id.to_owned()));
    }

    /// Says the labels of the image.
    pub(crate) fn set_labels(&mut self, labels: BTreeMap<String, String>) {
        for (name, value) in labels {
            self.values.set(Variable::Label(name), Ok(value));
        }
    }

    /// The request with names that are right but for their variables: for finding mistakes before any work is done.
    pub(crate) fn probe(&self, request: &BuildRequest) -> Result<Named, Error> {
        let mut values = Values::default();
        for variable in self.variables() {
            values.set(variable.clone(), Ok("x".into()));
        }
        self.with(request, &values)
    }

    /// The request with every name that is known before the build; labels stand for themselves.
    pub(crate) fn before_build(&self, request: &BuildRequest) -> Result<Named, Error> {
        self.with(request, &self.values.before_build())
    }

    /// The request with every name.
    pub(crate) fn after_build(&self, request: &BuildRequest) -> Result<Named, Error> {
        self.with(request, &self.values)
    }

    /// Names that say the content.
    pub(crate) fn by_content(&self, request: &BuildRequest) -> Result<Vec<Reference>, Error> {
        let has_id = |given: &&Given| {
            let variables: BTreeSet<_> = given.template.variables().collect();
            variables.contains(&Variable::Id) && !variables.iter().any(|v| matches!(v, Variable::Label(_)))
        };
        let mut found = vec![];
        for given in self.all().filter(has_id) {
            let reference = request.reference(&given.template.expand(&self.values)?)?;
            if !found.contains(&reference) {
                found.push(reference);
            }
        }
        Ok(found)
    }

    fn with(&self, request: &BuildRequest, values: &Values) -> Result<Named, Error> {
        let mut classes = BTreeMap::new();
        let mut expand = |all: &[Given]| -> Result<Vec<String>, Error> {
            let mut names = vec![];
            for given in all {
                match given.template.expand(values) {
                    Err(TemplateError::Missing { .. }) if given.optional => {}
                    other => {
                        let name = other?;
                        // Asked for twice: the later one, which can be taken back longer.
                        let class = classes.entry(name.clone()).or_insert(given.class);
                        *class = given.class.max(*class);
                        names.push(name);
                    }
                }
            }
            if names.is_empty() && !all.is_empty() {
                return Err(Error::new(
                    Kind::Configuration,
                    "the tag policy of the settings gives this image no tag: none of its variables is known here",
                )
                .hint("write a tag, or add one without variables to [tags]"));
            }
            Ok(names)
        };
        let mut request = request.clone();
        request.names = expand(&self.names)?;
        for (output, names) in request.outputs.iter_mut().zip(&self.outputs) {
            output.names = expand(names)?;
        }
        for (name, template) in request.cache_references().zip(&self.caches) {
            *name = template.expand(values)?;
        }
        let releases =
            classes.iter().filter(|(_, class)| **class == TagClass::Primary).filter_map(|(name, _)| Version::parse(tag_of(name)?));
        let version = values.get(&Variable::GitTag).ok().and_then(|tag| Version::parse(&tag)).or_else(|| releases.max());
        Ok(Named { request, classes, version })
    }
}

/// A name with a tag is itself; one without has the tags of the policy, if there is one.
fn read(name: &str, policies: &TagPolicies) -> Result<Vec<Given>, Error> {
    let template = Template::parse(name)?;
    let policy = policies.of(&registry_of(&template)?);
    if policy.is_empty() || tag_of(name).is_some() || name.contains('@') {
        return Ok(vec![Given { class: policy.class_of(&template), template, optional: false }]);
    }
    let tag = |(tag, class): (&str, TagClass)| {
        let template = Template::parse(&format!("{name}:{tag}"))
            .map_err(|error| Error::from(error).while_doing("the tag policy of the settings cannot be used"))?;
        Ok(Given { template, class, optional: true })
    };
    policy.tags().map(tag).collect()
}

/// The registry of a name; what has a variable in it is on the default one, or is refused before.
fn registry_of(template: &Template) -> Result<String, Error> {
    let mut values = Values::default();
    for variable in template.variables() {
        values.set(variable.clone(), Ok("x".into()));
    }
    let reference: Reference = template.expand(&values)?.parse()?;
    Ok(reference.registry().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policies() -> TagPolicies {
        let policy = |unique: &[&str], primary: &[&str], floating: &[&str]| {
            let own = |tags: &[&str]| tags.iter().map(|t| (*t).to_owned()).collect();
            TagPolicy { unique: own(unique), primary: own(primary), floating: own(floating) }
        };
        TagPolicies {
            all: policy(&["{git.sha}"], &["{git.tag}"], &["latest", "{git.branch}"]),
            registries: BTreeMap::from([("bare.io".to_owned(), policy(&[], &["{git.tag}"], &[]))]),
        }
    }

    fn named(names: &[&str], policies: &TagPolicies, git: &[(Variable, Result<&str, &str>)]) -> Result<Vec<String>, String> {
        let mut request = BuildRequest::new(Source::Stdin);
        request.names = names.iter().map(|n| (*n).to_owned()).collect();
        let mut naming = Naming::new(&request, policies).map_err(|e| e.to_string())?;
        for (variable, value) in git {
            naming.values.set(variable.clone(), value.map(str::to_owned).map_err(str::to_owned));
        }
        let named = naming.after_build(&request).map_err(|e| e.to_string())?;
        let targets = named.targets(&Output::new(crate::request::OutputKind::Image)).map_err(|e| e.to_string())?;
        Ok(targets.iter().map(|t| format!("{} {:?}", t.reference.familiar(), t.class)).collect())
    }

    #[test]
    fn caches_have_variables_too() {
        let with = |text: &str| {
            let mut request = BuildRequest::new(Source::Stdin);
            request.cache_to = vec![text.parse().unwrap()];
            request.cache_from = vec!["h.io/app:cache-{git.branch}".parse().unwrap(), "h.io/app:cache".parse().unwrap()];
            request
        };
        let filled = |text: &str| {
            let request = with(text);
            let mut naming = Naming::new(&request, &policies()).map_err(|e| e.to_string())?;
            naming.values.set(Variable::GitBranch, Ok("feature/x".into()));
            let mut named = naming.before_build(&request).map_err(|e| e.to_string())?;
            Ok::<_, String>(named.request.cache_references().map(|name| name.clone()).collect::<Vec<_>>())
        };
        assert_eq!(
            filled("type=registry,ref=h.io/app:{git.branch}").unwrap(),
            ["h.io/app:cache-feature-x", "h.io/app:cache", "h.io/app:feature-x"]
        );
        assert!(filled("type=registry,ref=h.io/app:{label:x}").unwrap_err().contains("before the image has labels"));
        assert!(filled("type=registry,ref=h.io/app:{git.tag}").unwrap_err().contains("there is no {git.tag}"));
    }

    #[test]
    fn the_policy_names_what_has_no_tag() {
        let release =
            [(Variable::GitSha, Ok("abc")), (Variable::GitTag, Ok("v1.2.3")), (Variable::GitBranch, Ok("main")), (Variable::Id, Ok("1d"))];
        let between = [(Variable::GitSha, Ok("abc")), (Variable::GitTag, Err("the commit has no tag")), (Variable::GitBranch, Ok("main"))];
        for (names, git, expect) in [
            // A git tag on the main branch gives exactly the configured tags.
            (
                &["h.io/app"][..],
                &release[..],
                Ok(vec!["h.io/app:abc Unique", "h.io/app:v1.2.3 Primary", "h.io/app:latest Floating", "h.io/app:main Floating"]),
            ),
            (&["h.io/app"], &between, Ok(vec!["h.io/app:abc Unique", "h.io/app:latest Floating", "h.io/app:main Floating"])),
            (&["h.io/app:{git.tag}"], &release, Ok(vec!["h.io/app:v1.2.3 Primary"])),
            (&["h.io/app:{git.tag}"], &between, Err("the name \"h.io/app:{git.tag}\": there is no {git.tag}: the commit has no tag")),
            (&["h.io/app:1", "h.io/app:latest"], &between, Ok(vec!["h.io/app:1 Primary", "h.io/app:latest Floating"])),
            (&["bare.io/app"], &release, Ok(vec!["bare.io/app:v1.2.3 Primary"])),
            (
                &["bare.io/app"],
                &between,
                Err("the tag policy of the settings gives this image no tag: none of its variables is known here"),
            ),
            (&["h.io/app:x{id}", "h.io/app:x1d"], &release, Ok(vec!["h.io/app:x1d Primary"])),
        ] {
            let got = named(names, &policies(), git);
            assert_eq!(got, expect.map(|rows| rows.iter().map(|r| (*r).to_owned()).collect()).map_err(str::to_owned), "{names:?}");
        }
        assert_eq!(named(&["app"], &TagPolicies::default(), &[]), Ok(vec!["app:latest Floating".to_owned()]));
    }
}
