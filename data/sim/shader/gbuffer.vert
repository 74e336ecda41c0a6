#version 450
// The vertex half of gbuffer.frag: positions and normals in the camera's frame. Block and member names are SAPIEN's.

layout(set = 0, binding = 0) uniform CameraBuffer {
  mat4 viewMatrix;
  mat4 projectionMatrix;
  mat4 viewMatrixInverse;
  mat4 projectionMatrixInverse;
  float width;
  float height;
} cameraBuffer;

layout(set = 1, binding = 0) uniform ObjectTransformBuffer {
  mat4 modelMatrix;
} objectTransformBuffer;

layout(set = 1, binding = 1) uniform ObjectDataBuffer {
  uvec4 segmentation;
  float transparency;
  int shadeFlat;
} objectDataBuffer;

layout(location = 0) in vec3 position;
layout(location = 1) in vec3 normal;
layout(location = 2) in vec2 uv;
layout(location = 3) in vec3 tangent;
layout(location = 4) in vec3 bitangent;

layout(location = 0) out vec3 outPosition;
layout(location = 1) out vec3 outNormal;
layout(location = 2) out vec2 outUV;

void main() {
  mat4 modelView = cameraBuffer.viewMatrix * objectTransformBuffer.modelMatrix;
  vec4 place = modelView * vec4(position, 1);
  outPosition = place.xyz;
  outNormal = mat3(modelView) * normal; // bodies are never scaled
  outUV = uv;
  gl_Position = cameraBuffer.projectionMatrix * place;
}
