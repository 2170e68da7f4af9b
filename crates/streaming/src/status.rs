//! How a session's end is told: Kubernetes' `metav1.Status` as JSON, or for old clients plain text.

use crate::BackendError;
use serde_json::json;

/// A session's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    Success,
    /// A command's exit code that is not 0, and the command. Clients know codes up to 255 only: others
    /// are told as 255.
    Code(i32, Vec<String>),
    /// What was tried, and why it failed.
    Failed(&'static str, BackendError),
}

impl End {
    /// For remotecommand v4 and later.
    pub fn json(&self) -> Vec<u8> {
        let status = match self {
            Self::Success => json!({"metadata": {}, "status": "Success"}),
            Self::Code(code, _) => json!({
                "metadata": {},
                "status": "Failure",
                "message": self.words(),
                "reason": "NonZeroExitCode",
                "details": {"causes": [{"reason": "ExitCode", "message": exit_code(*code).to_string()}]},
            }),
            Self::Failed(what, error) => json!({
                "metadata": {},
                "status": "Failure",
                "message": self.words(),
                "reason": "InternalError",
                "details": {"causes": [{"message": format!("{what}: {error}")}]},
                "code": 500,
            }),
        };
        status.to_string().into_bytes()
    }

    /// For v1 to v3, which say nothing of success.
    pub fn text(&self) -> Option<Vec<u8>> {
        (*self != Self::Success).then(|| self.words().into_bytes())
    }

    fn words(&self) -> String {
        match self {
            Self::Success => String::new(),
            Self::Code(code, command) => format!(
                "command terminated with non-zero exit code: error executing command [{}], exit code {}",
                command.join(" "),
                exit_code(*code)
            ),
            Self::Failed(what, error) => format!("Internal error occurred: {what}: {error}"),
        }
    }
}

fn exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_find_the_exit_code_where_they_look_for_it() {
        let end = End::Code(3, vec!["sh".into(), "-c".into()]);
        let status: serde_json::Value = serde_json::from_slice(&end.json()).unwrap();
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0]["message"], "3");
        assert!(String::from_utf8(end.text().unwrap()).unwrap().contains("[sh -c], exit code 3"));
        let status: serde_json::Value =
            serde_json::from_slice(&End::Code(-1, Vec::new()).json()).unwrap();
        assert_eq!(status["details"]["causes"][0]["message"], "255");
        let failed = End::Failed("error executing command in container", BackendError("no".into()));
        let status: serde_json::Value = serde_json::from_slice(&failed.json()).unwrap();
        assert_eq!(status["code"], 500);
        assert_eq!(End::Success.text(), None);
    }
}
