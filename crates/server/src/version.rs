//! Version.

use crate::{Server, status::NodeError};
use a3s_box_api::cri::{VersionRequest, VersionResponse};
use std::sync::Arc;

/// What kubelet and crictl call this runtime.
pub const RUNTIME_NAME: &str = "a3s-box";
/// Of this program.
pub const RUNTIME_VERSION: &str = env!("CARGO_PKG_VERSION");

/// Who answers here.
pub async fn version(_: Arc<Server>, _: VersionRequest) -> Result<VersionResponse, NodeError> {
    Ok(VersionResponse {
        // Kubelet's own version of the runtime interface, which it checks for equality.
        version: "0.1.0".to_owned(),
        runtime_name: RUNTIME_NAME.to_owned(),
        runtime_version: RUNTIME_VERSION.to_owned(),
        runtime_api_version: "v1".to_owned(),
    })
}
