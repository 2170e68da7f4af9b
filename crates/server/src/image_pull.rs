//! PullImage.

use crate::{
    Server,
    images::{self, Auth, ImageRpcError},
};
use a3s_box_api::cri;
use std::{sync::Arc, time::Instant};
use tracing::info;

/// Fetches the image. Images are the same for all pods and runtime handlers, so what the request says
/// of those changes nothing. A client that gives up ends the pull; what has arrived is kept.
pub async fn pull_image(
    server: Arc<Server>,
    request: cri::PullImageRequest,
) -> Result<cri::PullImageResponse, ImageRpcError> {
    let name = images::name_of(request.image.as_ref())?;
    let started = Instant::now();
    let pulled = server.images.pull(name, request.auth.and_then(auth)).await;
    server.node.sandboxes.deps().instruments.pulled(&pulled, started.elapsed());
    let image = pulled?;
    info!(id = image.id, ms = started.elapsed().as_millis(), "pulled");
    Ok(cri::PullImageResponse { image_ref: image.id })
}

/// Credentials, when there are any.
fn auth(config: cri::AuthConfig) -> Option<Auth> {
    let auth = Auth {
        username: config.username,
        password: config.password,
        auth: config.auth,
        server_address: config.server_address,
        identity_token: config.identity_token,
        registry_token: config.registry_token,
    };
    let nobody = Auth { server_address: auth.server_address.clone(), ..Auth::default() };
    (auth != nobody).then_some(auth)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_without_a_secret_are_none() {
        let config = cri::AuthConfig { server_address: "r".into(), ..Default::default() };
        assert!(auth(config).is_none());
        let config = cri::AuthConfig { registry_token: "t".into(), ..Default::default() };
        assert!(auth(config).is_some());
    }
}
