//! RemoveImage.

use crate::{
    Server,
    images::{self, ImageRpcError},
};
use a3s_box_api::cri;
use std::sync::Arc;

/// Removes the image with all its names. An unknown one is removed already.
pub async fn remove_image(
    server: Arc<Server>,
    request: cri::RemoveImageRequest,
) -> Result<cri::RemoveImageResponse, ImageRpcError> {
    server.images.remove(images::name_of(request.image.as_ref())?).await?;
    Ok(cri::RemoveImageResponse {})
}
