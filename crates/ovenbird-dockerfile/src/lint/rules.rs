//! The rules by name: what `--help`, reports and the pages in `docs/reference/lint` say of them.

/// One rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Name, as in `# check=skip=NAME`.
    pub name: &'static str,
    /// What should be, one sentence without a full stop.
    pub summary: &'static str,
    /// Runs only when it is asked for with `experimental=`.
    pub experimental: bool,
}

impl Rule {
    /// The page about it, from the top of the repository.
    pub fn page(&self) -> String {
        format!("docs/reference/lint/{}.md", self.name)
    }
}

const fn rule(name: &'static str, summary: &'static str) -> Rule {
    Rule { name, summary, experimental: false }
}

/// Every rule, by name. The names are BuildKit's; `UnconsumedBuildArg` is a warning that has no name there.
pub const RULES: [Rule; 23] = [
    rule("ConsistentInstructionCasing", "All instructions of a Dockerfile are written in the same case"),
    rule("CopyIgnoredFile", "COPY and ADD name no file that the ignore file leaves out"),
    rule("DuplicateStageName", "Every stage has a name of its own"),
    rule("ExposeInvalidFormat", "EXPOSE names ports of the container only"),
    rule("ExposeProtoCasing", "The protocol in EXPOSE is lowercase"),
    rule("FromAsCasing", "AS is written in the case of its FROM"),
    rule("FromPlatformFlagConstDisallowed", "FROM --platform is not a constant"),
    rule("InvalidBaseImagePlatform", "The base image has the platform that is built for"),
    rule("InvalidDefaultArgInFrom", "A FROM with variables is a valid name without any --build-arg"),
    Rule {
        name: "InvalidDefinitionDescription",
        summary: "A comment right above FROM or ARG describes it, and begins with its name",
        experimental: true,
    },
    rule("JSONArgsRecommended", "CMD and ENTRYPOINT are JSON arrays"),
    rule("LegacyKeyValueFormat", "ENV and LABEL separate key and value with an equals sign"),
    rule("MaintainerDeprecated", "The author is a label, not MAINTAINER"),
    rule("MultipleInstructionsDisallowed", "A stage has at most one CMD, ENTRYPOINT and HEALTHCHECK"),
    rule("NoEmptyContinuation", "There is no empty line inside an instruction"),
    rule("RedundantTargetPlatform", "FROM does not ask for the platform it has anyway"),
    rule("ReservedStageName", "No stage has a reserved name"),
    rule("SecretsUsedInArgOrEnv", "Secrets are not handed over in ARG or ENV"),
    rule("StageNameCasing", "Stage names are lowercase"),
    rule("UnconsumedBuildArg", "Every --build-arg is declared in the Dockerfile"),
    rule("UndefinedArgInFrom", "FROM uses only arguments that are declared before it"),
    rule("UndefinedVar", "Variables are defined before they are used"),
    rule("WorkdirRelativePath", "The first WORKDIR of a build is absolute"),
];

/// The rule of that name.
pub fn find(name: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.name == name)
}
