#version 450
// One pass and one target: texture or colour, one sun, light from sky and ground, a highlight. SAPIEN's default shader
// fills eight full-screen targets in four passes, which a software driver pays for in full. Names are SAPIEN's.

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

layout(set = 2, binding = 0) uniform MaterialBuffer {
  vec4 emission;
  vec4 baseColor;
  float fresnel;
  float roughness;
  float metallic;
  float transmission;
  float ior;
  float transmissionRoughness;
  int textureMask;
  int padding1;
  vec4 textureTransforms[6];
} materialBuffer;

layout(set = 2, binding = 1) uniform sampler2D colorTexture;
layout(set = 2, binding = 2) uniform sampler2D roughnessTexture;
layout(set = 2, binding = 3) uniform sampler2D normalTexture;
layout(set = 2, binding = 4) uniform sampler2D metallicTexture;
layout(set = 2, binding = 5) uniform sampler2D emissionTexture;

struct PointLight {
  vec4 position;
  vec4 emission;
};

struct DirectionalLight {
  vec4 direction;
  vec4 emission;
};

struct SpotLight {
  vec4 position;
  vec4 direction;
  vec4 emission;
};

layout(set = 3, binding = 0) uniform SceneBuffer {
  vec4 ambientLight;
  DirectionalLight directionalLights[3];
  SpotLight spotLights[10];
  PointLight pointLights[10];
  SpotLight texturedLights[1];
} sceneBuffer;

layout(location = 0) in vec3 inPosition;
layout(location = 1) in vec3 inNormal;
layout(location = 2) in vec2 inUV;

layout(location = 0) out vec4 outColor;

void main() {
  vec3 albedo = materialBuffer.baseColor.rgb;
  if ((materialBuffer.textureMask & 1) != 0) {
    albedo *= texture(colorTexture, inUV).rgb;
  }
  vec3 normal = normalize(inNormal);
  vec3 toSun = -mat3(cameraBuffer.viewMatrix) * sceneBuffer.directionalLights[0].direction.xyz;
  vec3 up = mat3(cameraBuffer.viewMatrix) * vec3(0, 0, 1);
  vec3 halfway = normalize(toSun - normalize(inPosition));

  float facing = max(dot(normal, toSun), 0);
  float sky = 0.75 + 0.25 * dot(normal, up);
  float shine = max(dot(normal, halfway), 0);
  shine *= shine, shine *= shine, shine *= shine, shine *= shine, shine *= shine; // to the 32nd; pow costs more

  vec3 sun = sceneBuffer.directionalLights[0].emission.rgb * facing / 3.14159265;
  vec3 color = albedo * (sun + sky * sceneBuffer.ambientLight.rgb) + 0.3 * materialBuffer.fresnel * shine * sun;
  outColor = vec4(sqrt(clamp(color, 0, 1)), 1); // gamma 2
}
